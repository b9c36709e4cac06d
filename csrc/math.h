// Nonlinear functions of one float32 value and their differences without cancellation.
//
//   phi(x) = x s(v(x)), s the logistic function:  silu v = x;  quick_gelu v = 1.702 x;
//            gelu_tanh v = 2 sqrt(2/pi) (x + 0.044715 x^3), because (1 + tanh u) / 2 = s(2u)
//   phi(x) = x Phi(x), Phi the normal distribution function:  gelu
//   phi(x) = max(x, 0):  relu
//
// The fine-tuned value is x + dx with dx often 1e-4 of x, so differences are written from dx.
// No branches: compilers turn a loop over any of these into vector code. Shared with CUDA.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FDA_FN static __forceinline__ __host__ __device__
#else
// Internal linkage: this header is compiled once per instruction set.
#define FDA_FN static inline __attribute__((always_inline))
#endif

namespace fda {

enum class Kind : int { gelu = 0, gelu_tanh = 1, quick_gelu = 2, silu = 3, relu = 4 };

FDA_FN float absolute(float x) { return x < 0.0f ? -x : x; }

FDA_FN float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FDA_FN uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

struct Exponential {
  float exp;    // exp(-a)
  float expm1;  // exp(-a) - 1
};

// exp(r) - 1 for |r| <= ln(2) / 2: Taylor to degree 7, error 6e-9 of r.
FDA_FN float expm1_reduced(float r) {
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  return p * (r * r) + r;
}

// exp(-a) and exp(-a) - 1 for a >= 0, each within 1.5 ulp; exp(-a) is 0 from a = 87.3 on.
FDA_FN Exponential exp_negative(float a) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer below
  const float x = a < 87.3f ? -a : -87.3f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  // ln 2 in two parts; the first has 9 bits, so n times it is exact.
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float e = expm1_reduced(r);
  const float scale = as_float((as_bits(shifted) + 127u) << 23);
  Exponential out;
  out.exp = a < 87.3f ? scale * e + scale : 0.0f;
  out.expm1 = scale * e + (scale - 1.0f);
  return out;
}

// exp(x) - 1 for x < 88, within 1.5 ulp; -1 from -87.3 downwards.
FDA_FN float expm1_below_88(float x) {
  const float kRound = 12582912.0f;
  const float z = x > -87.3f ? x : -87.3f;
  const float shifted = z * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (z - n * 0.693359375f) - n * -2.12194440e-4f;
  const float e = expm1_reduced(r);
  const float scale = as_float((as_bits(shifted) + 127u) << 23);
  return scale * e + (scale - 1.0f);
}

struct Logistic {
  float s;  // 1 / (1 + exp(-v))
  float c;  // 1 - s
};

// Both to full relative accuracy.
FDA_FN Logistic logistic(float v) {
  const float e = exp_negative(absolute(v)).exp;
  const float large = 1.0f / (1.0f + e);
  const float small = e * large;
  return v >= 0.0f ? Logistic{large, small} : Logistic{small, large};
}

// s(v + dv) - s(v) = s(high) (1 - s(low)) (1 - exp(-|dv|)) with the sign of dv.
FDA_FN float logistic_difference(Logistic at, Logistic at_f, float dv) {
  const float rise = -exp_negative(absolute(dv)).expm1;
  return dv > 0.0f ? at_f.s * at.c * rise : -(at.s * at_f.c * rise);
}

struct Normal {
  float cdf;   // Phi(x)
  float tail;  // Phi(-|x|), to full relative accuracy
  float pdf;   // exp(-x^2 / 2) / sqrt(2 pi)
};

// Phi(-a) = exp(-a^2 / 2) P(t) / (a + 2.5) with t = (a - 2.5) / (a + 2.5): relative error of the
// fit 2e-8, of the evaluation 3e-7, plus a^2 / 2 roundings of the exponential.
FDA_FN Normal normal(float x) {
  const float a = absolute(x);
  const float e = exp_negative(0.5f * a * a).exp;
  const float u = 1.0f / (a + 2.5f);
  const float t = 1.0f - 5.0f * u;
  float p = -1.556264745e-04f;
  p = p * t - 3.079416497e-04f;
  p = p * t + 6.842311145e-04f;
  p = p * t + 2.520951428e-03f;
  p = p * t - 1.601519366e-03f;
  p = p * t - 1.638544104e-02f;
  p = p * t + 9.236068040e-03f;
  p = p * t + 1.319869195e-01f;
  p = p * t - 4.336920226e-01f;
  p = p * t + 7.066566607e-01f;
  Normal out;
  out.tail = e * (p * u);
  out.cdf = x > 0.0f ? 1.0f - out.tail : out.tail;
  out.pdf = 0.398942280f * e;
  return out;
}

// Phi(x + dx) - Phi(x): midpoint Taylor series for |dx| < 1/4, difference of the tails beyond.
FDA_FN float normal_cdf_difference(float x, float dx, Normal at, Normal at_f) {
  const float m = x + 0.5f * dx;
  const float m2 = m * m < 200.0f ? m * m : 200.0f;  // the density is 0 long before; no overflow
  const float d2 = dx * dx;
  const float pdf = 0.398942280f * exp_negative(0.5f * m2).exp;
  const float fourth = (m2 * m2 - 6.0f * m2 + 3.0f) * (d2 * d2) * (1.0f / 1920.0f);
  const float near = dx * pdf * (1.0f + (m2 - 1.0f) * d2 * (1.0f / 24.0f) + fourth);
  const bool right = x > 0.0f && x + dx > 0.0f;
  const float far = right ? at.tail - at_f.tail : at_f.cdf - at.cdf;
  return d2 < 0.0625f ? near : far;
}

// pdf(x + dx) - pdf(x), written from the larger of the two so that nothing overflows.
FDA_FN float normal_pdf_difference(float x, float dx, Normal at, Normal at_f) {
  const float s = -dx * (x + 0.5f * dx);  // log of the ratio
  const float fall = exp_negative(absolute(s)).expm1;
  return s > 0.0f ? -at_f.pdf * fall : at.pdf * fall;
}

struct Argument {
  float v, v1, v2;  // v(x), v'(x), v''(x)
};

const float kTanhScale = 1.59576912f;  // 2 sqrt(2 / pi)
const float kTanhCubic = 0.044715f;

// Beyond |x| = 12 the logistic function is 0 or 1 and x^3 would only overflow.
FDA_FN float tanh_domain(float x) {
  const float high = x > 12.0f ? 12.0f : x;
  return high < -12.0f ? -12.0f : high;
}

template <Kind K>
FDA_FN Argument gate_argument(float x) {
  if constexpr (K == Kind::silu) return {x, 1.0f, 0.0f};
  if constexpr (K == Kind::quick_gelu) return {1.702f * x, 1.702f, 0.0f};
  const float z = tanh_domain(x);
  const float z2 = kTanhCubic * z * z;
  return {kTanhScale * z * (1.0f + z2), kTanhScale * (1.0f + 3.0f * z2),
          kTanhScale * 6.0f * kTanhCubic * z};
}

// v(x + dx) - v(x) and v'(x + dx) - v'(x), in v and v1.
template <Kind K>
FDA_FN Argument gate_argument_difference(float x, float dx) {
  if constexpr (K == Kind::silu) return {dx, 0.0f, 0.0f};
  if constexpr (K == Kind::quick_gelu) return {1.702f * dx, 0.0f, 0.0f};
  const float z = tanh_domain(x);
  const float w = tanh_domain(x + dx);
  const float dz = (z == x && w == x + dx) ? dx : w - z;
  // z^2 + z w + w^2 is never negative: nothing cancels.
  return {kTanhScale * dz * (1.0f + kTanhCubic * (z * z + z * w + w * w)),
          kTanhScale * 3.0f * kTanhCubic * dz * (z + w), 0.0f};
}

struct Derivatives {
  float phi, phi1, phi2;  // phi(x), phi'(x), phi''(x)
};

// The compiler drops what the caller does not use.
template <Kind K>
FDA_FN Derivatives derivatives(float x) {
  if constexpr (K == Kind::relu) {
    return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f, 0.0f};
  } else if constexpr (K == Kind::gelu) {
    const Normal at = normal(x);
    return {x * at.cdf, at.cdf + x * at.pdf, at.pdf * (2.0f - x * x)};
  } else {
    const Argument a = gate_argument<K>(x);
    const Logistic l = logistic(a.v);
    const float slope = l.s * l.c;
    return {x * l.s, l.s + x * (slope * a.v1),
            slope * (2.0f * a.v1 + x * (a.v2 + (l.c - l.s) * (a.v1 * a.v1)))};
  }
}

struct Differences {
  float phi, phi1, phi2;  // at x
  float phi_f, phi1_f;    // at x + dx
  float dphi, dphi1;      // phi(x + dx) - phi(x), phi'(x + dx) - phi'(x)
};

template <Kind K>
FDA_FN Differences differences(float x, float dx) {
  const float x_f = x + dx;
  const Derivatives at = derivatives<K>(x);
  Differences out;
  out.phi = at.phi;
  out.phi1 = at.phi1;
  out.phi2 = at.phi2;
  if constexpr (K == Kind::relu) {
    const Derivatives at_f = derivatives<K>(x_f);
    out.phi_f = at_f.phi;
    out.phi1_f = at_f.phi1;
    out.dphi = (x > 0.0f && x_f > 0.0f) ? dx : at_f.phi - at.phi;
    out.dphi1 = at_f.phi1 - at.phi1;
  } else if constexpr (K == Kind::gelu) {
    const Normal n = normal(x);
    const Normal n_f = normal(x_f);
    const float dcdf = normal_cdf_difference(x, dx, n, n_f);
    const float dpdf = normal_pdf_difference(x, dx, n, n_f);
    out.phi_f = x_f * n_f.cdf;
    out.phi1_f = n_f.cdf + x_f * n_f.pdf;
    out.dphi = dx * n_f.cdf + x * dcdf;
    out.dphi1 = dcdf + dx * n_f.pdf + x * dpdf;
  } else {
    const Argument a = gate_argument<K>(x);
    const Argument a_f = gate_argument<K>(x_f);
    const Argument da = gate_argument_difference<K>(x, dx);
    const Logistic l = logistic(a.v);
    const Logistic l_f = logistic(a_f.v);
    const float ds = logistic_difference(l, l_f, da.v);
    const float slope = l.s * l.c;
    const float slope_f = l_f.s * l_f.c * a_f.v1;
    const float dslope = ds * (l.c - l_f.s) * a_f.v1 + slope * da.v1;
    out.phi_f = x_f * l_f.s;
    out.phi1_f = l_f.s + x_f * slope_f;
    // Under the cubic argument the parts of a large step cancel; the plain difference is accurate
    // there.
    const bool near = K != Kind::gelu_tanh || dx * dx < 1.0f;
    out.dphi = near ? dx * l_f.s + x * ds : out.phi_f - out.phi;
    out.dphi1 = near ? ds + dx * slope_f + x * dslope : out.phi1_f - out.phi1;
  }
  return out;
}

}  // namespace fda
