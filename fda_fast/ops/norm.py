"""LayerNorm ("layer") and RMSNorm ("rms"): the four sweeps, and the first-order adjoint.

    y = xh w + c,   xh = rho xc,   rho = 1 / sqrt(mean(xc^2) + eps)

with xc = x - mean(x) for "layer" and x for "rms". Values are contiguous [K, R, d]; weight and bias
[d] or None (1 and 0); their task vectors tw, tb and tangents mw, mb [K, d] or None (zero). Each
function passes once over its tensors; row statistics are recomputed rather than kept.
"""

from __future__ import annotations

from torch import Tensor

from fda_fast.ops import dispatch


def forward(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tw: Tensor | None,
    tb: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y and dy = (xh_f - xh) w + xh_f tw + tb; dy is None if dx, tw and tb all are."""
    module = dispatch.implementation("norm", x, backend)
    return module.forward(kind, x, dx, weight, bias, tw, tb, eps)


def backward(
    kind: str,
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    eps: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g_x [K, R, d], G_w = sum_r g xh [K, d] and G_c = sum_r g [K, d]; None where not needed."""
    module = dispatch.implementation("norm", x, backend)
    return module.backward(kind, x, g, weight, eps, need_input, need_weight, need_bias)


def tangent(
    kind: str,
    x: Tensor,
    t: Tensor | None,
    weight: Tensor | None,
    mw: Tensor | None,
    mb: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> Tensor | None:
    """t_y = w J(x) t + xh mw + mb; None if t, mw and mb all are."""
    return dispatch.implementation("norm", x, backend).tangent(kind, x, t, weight, mw, mb, eps)


def reverse(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    g: Tensor | None,
    t: Tensor | None,
    S: Tensor,
    b: Tensor,
    weight: Tensor | None,
    tw: Tensor | None,
    mw: Tensor | None,
    eps: float,
    need_b: bool,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S and b at the input, J the Jacobian of xh (symmetric).

        S_x = J(x) (w S + mw g) + (J(x + dx) - J(x)) (w b) + J(x + dx) (tw b)
              + d/dx <w g, J(x) t>
        b_x = J(x + dx) ((w + tw) b)

    A dx, g, t, tw or mw of None is zero; b_x is None unless ``need_b``.
    """
    module = dispatch.implementation("norm", x, backend)
    return module.reverse(kind, x, dx, g, t, S, b, weight, tw, mw, eps, need_b)


def adjoint(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    b: Tensor,
    weight: Tensor | None,
    tw: Tensor | None,
    eps: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """b_x = J(x + dx) ((w + tw) b), sum_r b xh_f [K, d], sum_r b [K, d]; None if not needed."""
    module = dispatch.implementation("norm", x, backend)
    return module.adjoint(kind, x, dx, b, weight, tw, eps, need_input, need_weight, need_bias)
