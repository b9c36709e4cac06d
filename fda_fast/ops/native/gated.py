"""Gated activations in C++; see fda_fast.ops.gated. Differences without cancellation."""

from __future__ import annotations

from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops.memory import empty, empty_like
from fda_fast.ops.native.activation import number
from fda_fast.ops.native.call import address, library, threads


def _sizes(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Rows, width h of one half, and the shape of an output."""
    width = x.shape[-1]
    if width % 2:
        raise InputError("x", expected="an even last dimension, [gate | up]", got=[*x.shape])
    rows = x.numel() // width if width else 0
    return rows, width // 2, (*x.shape[:-1], width // 2)


def forward(kind: str, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.gated.forward."""
    rows, h, single = _sizes(x)
    y, dy = empty(single, x), None if dx is None else empty(single, x)
    library().gated_forward(
        number(kind), rows, h, address("x", x, x.shape), address("dx", dx, x.shape),
        y.data_ptr(), address("dy", dy, single), threads(),
    )  # fmt: skip
    return y, dy


def backward(kind: str, x: Tensor, g: Tensor) -> Tensor:
    """See fda_fast.ops.gated.backward."""
    return adjoint(kind, x, None, g)


def tangent(kind: str, x: Tensor, t: Tensor) -> Tensor:
    """See fda_fast.ops.gated.tangent."""
    rows, h, single = _sizes(x)
    out = empty(single, x)
    library().gated_tangent(
        number(kind), rows, h, address("x", x, x.shape), address("t", t, x.shape),
        out.data_ptr(), threads(),
    )  # fmt: skip
    return out


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
    rows, h, single = _sizes(x)
    S_x, b_x = empty_like(x), empty_like(x) if need_b else None
    if g is None:
        t = None
    library().gated_reverse(
        number(kind), rows, h, address("x", x, x.shape), address("dx", dx, x.shape),
        address("g", None if t is None else g, single), address("t", t, x.shape),
        address("S", S, single), address("b", b, single),
        S_x.data_ptr(), address("b_x", b_x, x.shape), threads(),
    )  # fmt: skip
    return S_x, b_x


def adjoint(kind: str, x: Tensor, dx: Tensor | None, b: Tensor) -> Tensor:
    """See fda_fast.ops.gated.adjoint."""
    rows, h, single = _sizes(x)
    out = empty_like(x)
    library().gated_backward(
        number(kind), rows, h, address("x", x, x.shape), address("dx", dx, x.shape),
        address("b", b, single), out.data_ptr(), threads(),
    )  # fmt: skip
    return out
