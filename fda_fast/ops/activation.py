"""Elementwise activations y = phi(x): the four sweeps, and the first-order adjoint.

Kinds: "gelu" (erf), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)), "silu", "relu". All tensors of
a call have one shape and are contiguous; each function reads and writes every element once.
"""

from __future__ import annotations

from torch import Tensor

from fda_fast.ops import dispatch
from fda_fast.ops.reference.activation import KINDS as KINDS


def forward(
    kind: str, x: Tensor, dx: Tensor | None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """y = phi(x) and dy = phi(x + dx) - phi(x); dy is None if dx is."""
    return dispatch.implementation("activation", x, backend).forward(kind, x, dx)


def backward(kind: str, x: Tensor, g: Tensor, *, backend: str = "auto") -> Tensor:
    """g_x = phi'(x) g."""
    return dispatch.implementation("activation", x, backend).backward(kind, x, g)


def tangent(kind: str, x: Tensor, t: Tensor, *, backend: str = "auto") -> Tensor:
    """t_y = phi'(x) t."""
    return dispatch.implementation("activation", x, backend).tangent(kind, x, t)


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
    """S and b at the input.

        S_x = phi'(x) S + (phi'(x + dx) - phi'(x)) b + phi''(x) g t,    b_x = phi'(x + dx) b

    A dx, g or t of None is zero; b_x is None unless ``need_b``.
    """
    module = dispatch.implementation("activation", x, backend)
    return module.reverse(kind, x, dx, g, t, S, b, need_b)


def adjoint(kind: str, x: Tensor, dx: Tensor | None, b: Tensor, *, backend: str = "auto") -> Tensor:
    """b_x = phi'(x + dx) b."""
    return dispatch.implementation("activation", x, backend).adjoint(kind, x, dx, b)
