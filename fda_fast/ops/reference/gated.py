"""Gated activations y = phi(gate) * up on packed [gate | up], in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.ops.reference.activation import curvature, slope, value


def forward(kind: str, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.gated.forward."""
    gate, up = x.chunk(2, dim=-1)
    phi = value(kind, gate)
    if dx is None:
        return phi * up, None
    d_gate, d_up = dx.chunk(2, dim=-1)
    return phi * up, phi * d_up + (value(kind, gate + d_gate) - phi) * (up + d_up)


def backward(kind: str, x: Tensor, g: Tensor) -> Tensor:
    """See fda_fast.ops.gated.backward."""
    gate, up = x.chunk(2, dim=-1)
    return torch.cat([slope(kind, gate) * up * g, value(kind, gate) * g], dim=-1)


def tangent(kind: str, x: Tensor, t: Tensor) -> Tensor:
    """See fda_fast.ops.gated.tangent."""
    gate, up = x.chunk(2, dim=-1)
    t_gate, t_up = t.chunk(2, dim=-1)
    return slope(kind, gate) * up * t_gate + value(kind, gate) * t_up


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
    """See fda_fast.ops.gated.reverse."""
    gate, up = x.chunk(2, dim=-1)
    phi, slope_p = value(kind, gate), slope(kind, gate)
    phi_f, slope_f, up_f = phi, slope_p, up
    S_gate, S_up = slope_p * up * S, phi * S
    if dx is not None:
        d_gate, d_up = dx.chunk(2, dim=-1)
        phi_f, slope_f, up_f = value(kind, gate + d_gate), slope(kind, gate + d_gate), up + d_up
        S_gate += ((slope_f - slope_p) * up_f + slope_p * d_up) * b
        S_up += (phi_f - phi) * b
    if g is not None and t is not None:
        t_gate, t_up = t.chunk(2, dim=-1)
        S_gate += g * (curvature(kind, gate) * up * t_gate + slope_p * t_up)
        S_up += g * slope_p * t_gate
    S_x = torch.cat([S_gate, S_up], dim=-1)
    return S_x, torch.cat([slope_f * up_f * b, phi_f * b], dim=-1) if need_b else None


def adjoint(kind: str, x: Tensor, dx: Tensor | None, b: Tensor) -> Tensor:
    """See fda_fast.ops.gated.adjoint."""
    return backward(kind, x if dx is None else x + dx, b)
