"""Gated activations y = phi(gate) * up: the four sweeps, and the first-order adjoint.

Kinds as in ``fda_fast.ops.activation``. The input side (x, dx, g_x, t, S_x, b_x) is packed
[.., 2h] = [gate | up]; the output side (y, dy, g, S, b) is [.., h]. All contiguous.
"""

from __future__ import annotations

from torch import Tensor

from fda_fast.ops import dispatch


def forward(
    kind: str, x: Tensor, dx: Tensor | None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """y and dy = phi(gate) d_up + (phi(gate + d_gate) - phi(gate)) (up + d_up)."""
    return dispatch.implementation("gated", x, backend).forward(kind, x, dx)


def backward(kind: str, x: Tensor, g: Tensor, *, backend: str = "auto") -> Tensor:
    """g_x = [phi'(gate) up g | phi(gate) g]."""
    return dispatch.implementation("gated", x, backend).backward(kind, x, g)


def tangent(kind: str, x: Tensor, t: Tensor, *, backend: str = "auto") -> Tensor:
    """t_y = phi'(gate) up t_gate + phi(gate) t_up."""
    return dispatch.implementation("gated", x, backend).tangent(kind, x, t)


def reverse(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    g: Tensor | None,
    t: Tensor | None,
    S: Tensor,
    b: Tensor,
    need_b: bool,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S and b at the input, with gate_f = gate + d_gate, up_f = up + d_up.

        S_gate = phi'(gate) up S + (phi'(gate_f) up_f - phi'(gate) up) b
                 + g (phi''(gate) up t_gate + phi'(gate) t_up)
        S_up   = phi(gate) S + (phi(gate_f) - phi(gate)) b + g phi'(gate) t_gate
        b_x    = [phi'(gate_f) up_f b | phi(gate_f) b]

    A dx, g or t of None is zero; b_x is None unless ``need_b``.
    """
    module = dispatch.implementation("gated", x, backend)
    return module.reverse(kind, x, dx, g, t, S, b, need_b)


def adjoint(kind: str, x: Tensor, dx: Tensor | None, b: Tensor, *, backend: str = "auto") -> Tensor:
    """b_x = [phi'(gate_f) up_f b | phi(gate_f) b]."""
    return dispatch.implementation("gated", x, backend).adjoint(kind, x, dx, b)
