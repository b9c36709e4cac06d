"""Elementwise activations in plain torch, with the derivatives that the four sweeps need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")

_SIGMOID_SLOPE = {"silu": 1.0, "quick_gelu": 1.702}
_TANH_CUBE = 0.044715
_TANH_SCALE = math.sqrt(2 / math.pi)


def value(kind: str, x: Tensor) -> Tensor:
    """phi(x)."""
    if kind == "relu":
        return x.clamp_min(0)
    if kind == "gelu":
        return x * _normal_cdf(x)
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(_TANH_SCALE * (x + _TANH_CUBE * x**3)))
    return x * torch.sigmoid(_SIGMOID_SLOPE[kind] * x)


def slope(kind: str, x: Tensor) -> Tensor:
    """phi'(x); 0 at the kink of relu."""
    if kind == "relu":
        return (x > 0).to(x.dtype)
    if kind == "gelu":
        return _normal_cdf(x) + x * _normal_pdf(x)
    if kind == "gelu_tanh":
        th, th_1, _ = _tanh_part(x)
        return 0.5 * (1 + th) + 0.5 * x * th_1
    k = _SIGMOID_SLOPE[kind]
    s = torch.sigmoid(k * x)
    return s + k * x * s * (1 - s)


def curvature(kind: str, x: Tensor) -> Tensor:
    """phi''(x); 0 for relu."""
    if kind == "relu":
        return torch.zeros_like(x)
    if kind == "gelu":
        return _normal_pdf(x) * (2 - x * x)
    if kind == "gelu_tanh":
        _, th_1, th_2 = _tanh_part(x)
        return th_1 + 0.5 * x * th_2
    k = _SIGMOID_SLOPE[kind]
    s = torch.sigmoid(k * x)
    return k * s * (1 - s) * (2 + k * x * (1 - 2 * s))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _normal_pdf(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _tanh_part(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh(u(x)) of the tanh form of gelu, with its first and second derivative in x."""
    u_1 = _TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x)
    u_2 = 6 * _TANH_SCALE * _TANH_CUBE * x
    th = torch.tanh(_TANH_SCALE * (x + _TANH_CUBE * x**3))
    sech2 = 1 - th * th
    th_1 = sech2 * u_1
    return th, th_1, sech2 * u_2 - 2 * th * th_1 * u_1


def forward(kind: str, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.activation.forward."""
    y = value(kind, x)
    return y, None if dx is None else value(kind, x + dx) - y


def backward(kind: str, x: Tensor, g: Tensor) -> Tensor:
    """See fda_fast.ops.activation.backward."""
    return slope(kind, x) * g


def tangent(kind: str, x: Tensor, t: Tensor) -> Tensor:
    """See fda_fast.ops.activation.tangent."""
    return slope(kind, x) * t


def reverse(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    g: Tensor | None,
    t: Tensor | None,
    S: Tensor,
    b: Tensor,
    need_b: bool,
) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.activation.reverse."""
    slope_p = slope(kind, x)
    slope_f = slope_p if dx is None else slope(kind, x + dx)
    S_x = slope_p * S
    if dx is not None:
        S_x += (slope_f - slope_p) * b
    if g is not None and t is not None:
        S_x += curvature(kind, x) * g * t
    return S_x, slope_f * b if need_b else None


def adjoint(kind: str, x: Tensor, dx: Tensor | None, b: Tensor) -> Tensor:
    """See fda_fast.ops.activation.adjoint."""
    return slope(kind, x if dx is None else x + dx) * b
