"""Nonlinear functions of one float32 value inside a kernel, and differences without cancellation.

    phi(x) = x s(v(x)),  s the logistic function:  silu v = x;  quick_gelu v = 1.702 x;
             gelu_tanh v = 2 sqrt(2/pi) (x + 0.044715 x^3)  (since (1 + tanh u) / 2 = s(2u))
    phi(x) = x Phi(x),   Phi the normal distribution function:  gelu
    phi(x) = max(x, 0):  relu

The fine-tuned value is x + dx with dx often 1e-4 of x. Differences are therefore written from dx:
s(a) - s(b) = s(a) (1 - s(b)) (1 - exp(b - a)), and likewise for the normal density.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1 to float32 accuracy; Taylor to degree 7 inside |x| < 0.35."""
    near = tl.abs(x) < 0.35
    a = tl.where(near, x, 0.0)
    series = 1.0 + a * (1.0 / 7.0)
    series = 1.0 + a * (1.0 / 6.0) * series
    series = 1.0 + a * (1.0 / 5.0) * series
    series = 1.0 + a * (1.0 / 4.0) * series
    series = 1.0 + a * (1.0 / 3.0) * series
    series = 1.0 + a * 0.5 * series
    return tl.where(near, a * series, tl.exp(x) - 1.0)


@triton.jit
def logistic(v):
    """s(v) and 1 - s(v), both to full relative accuracy."""
    z = tl.exp(-tl.abs(v))
    big = 1.0 / (1.0 + z)
    small = z * big
    return tl.where(v >= 0, big, small), tl.where(v >= 0, small, big)


@triton.jit
def logistic_difference(s, q, s_f, q_f, dv):
    """s(v + dv) - s(v), given s and q = 1 - s at both: the larger s times the larger q.

    s(a) - s(b) = s(a) (1 - s(b)) (1 - exp(b - a)); nothing cancels, overflows or divides.
    """
    shrink = -expm1(-tl.abs(dv))
    return tl.where(dv > 0, s_f * q * shrink, -s * q_f * shrink)


@triton.jit
def gate_argument(x, KIND: tl.constexpr):
    """v(x), v'(x), v''(x) of the kinds x s(v(x))."""
    if KIND == "silu":
        return x, 1.0 + 0.0 * x, 0.0 * x
    elif KIND == "quick_gelu":
        return 1.702 * x, 1.702 + 0.0 * x, 0.0 * x
    else:
        c = 1.5957691216057308  # 2 sqrt(2/pi)
        a = 0.044715
        return c * (x + a * x * x * x), c * (1.0 + 3.0 * a * x * x), c * 6.0 * a * x


@triton.jit
def gate_argument_difference(x, dx, KIND: tl.constexpr):
    """v(x + dx) - v(x) and v'(x + dx) - v'(x)."""
    if KIND == "silu":
        return dx, 0.0 * dx
    elif KIND == "quick_gelu":
        return 1.702 * dx, 0.0 * dx
    else:
        c = 1.5957691216057308
        a = 0.044715
        first = c * dx * (1.0 + a * (3.0 * x * x + 3.0 * x * dx + dx * dx))
        return first, c * 3.0 * a * dx * (2.0 * x + dx)


@triton.jit
def normal_cdf(x):
    """Distribution function of the standard normal."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def normal_pdf(x):
    """Density of the standard normal."""
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def normal_cdf_difference(x, dx, cdf, cdf_f):
    """Phi(x + dx) - Phi(x): midpoint Taylor series for |dx| < 0.25, plain beyond."""
    near = tl.abs(dx) < 0.25
    h = tl.where(near, dx, 0.0)
    # The density is zero beyond 20; powers of m must not overflow.
    m = tl.minimum(tl.maximum(x + 0.5 * h, -20.0), 20.0)
    m2 = m * m
    h2 = h * h
    fourth = (m2 * m2 - 6.0 * m2 + 3.0) * h2 * h2 * (1.0 / 1920.0)
    series = 1.0 + (m2 - 1.0) * h2 * (1.0 / 24.0) + fourth
    return tl.where(near, h * normal_pdf(m) * series, cdf_f - cdf)


@triton.jit
def normal_pdf_difference(x, dx, pdf, pdf_f):
    """pdf(x + dx) - pdf(x), written from the larger side so nothing overflows."""
    e = -dx * (x + 0.5 * dx)
    low = expm1(-tl.abs(e))
    return tl.where(e > 0, -pdf_f * low, pdf * low)


@triton.jit
def derivatives(x, KIND: tl.constexpr):
    """phi(x), phi'(x), phi''(x). The compiler drops what the caller does not use."""
    if KIND == "relu":
        one = tl.where(x > 0, 1.0, 0.0)
        # max of a NaN must stay a NaN, as in torch.
        return tl.where(x > 0, x, 0.0 * x), one, 0.0 * one
    elif KIND == "gelu":
        cdf = normal_cdf(x)
        pdf = normal_pdf(x)
        return x * cdf, cdf + x * pdf, pdf * (2.0 - x * x)
    else:
        v, v1, v2 = gate_argument(x, KIND)
        s, q = logistic(v)
        sq = s * q
        return x * s, s + x * sq * v1, sq * (2.0 * v1 + x * (v2 + (q - s) * v1 * v1))


@triton.jit
def differences(x, dx, KIND: tl.constexpr):
    """phi and phi' at x + dx, and their differences to x: phi_f, phi1_f, dphi, dphi1.

    Beyond |dx| = 1 the two values differ by themselves, and the plain difference is the better one.
    """
    x_f = x + dx
    phi, phi1, _ = derivatives(x, KIND)
    phi_f, phi1_f, _ = derivatives(x_f, KIND)
    if KIND == "relu":
        dphi = tl.where((x > 0) & (x_f > 0), dx, phi_f - phi)
        return phi_f, phi1_f, dphi, phi1_f - phi1
    if KIND == "gelu":
        cdf = normal_cdf(x)
        cdf_f = normal_cdf(x_f)
        pdf = normal_pdf(x)
        pdf_f = normal_pdf(x_f)
        dcdf = normal_cdf_difference(x, dx, cdf, cdf_f)
        dpdf = normal_pdf_difference(x, dx, pdf, pdf_f)
        dphi = dx * cdf_f + x * dcdf
        dphi1 = dcdf + dx * pdf_f + x * dpdf
    else:
        v, _, _ = gate_argument(x, KIND)
        v_f, v1_f, _ = gate_argument(x_f, KIND)
        dv, dv1 = gate_argument_difference(x, dx, KIND)
        s, q = logistic(v)
        s_f, q_f = logistic(v_f)
        ds = logistic_difference(s, q, s_f, q_f, dv)
        # p = s (1 - s) v'
        dp = ds * (q - s_f) * v1_f + s * q * dv1
        dphi = dx * s_f + x * ds
        dphi1 = ds + dx * (s_f * q_f * v1_f) + x * dp
    large = tl.abs(dx) > 1.0
    dphi = tl.where(large, phi_f - phi, dphi)
    return phi_f, phi1_f, dphi, tl.where(large, phi1_f - phi1, dphi1)


@triton.jit
def scale_step(rho, variance_step):
    """rho_f and rho_f - rho, from 1/s_f - 1/s = (s^2 - s_f^2) / (s s_f (s + s_f)), s = 1/rho."""
    s = 1.0 / rho
    s_f = tl.sqrt_rn(s * s + variance_step)
    return 1.0 / s_f, -variance_step / (s * s_f * (s + s_f))
