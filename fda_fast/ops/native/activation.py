"""Elementwise activations in C++; see fda_fast.ops.activation. Differences without cancellation."""

from __future__ import annotations

from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops.memory import empty_like
from fda_fast.ops.native.call import address, library, threads

# The numbers of csrc/math.h.
_NUMBERS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "silu": 3, "relu": 4}


def number(kind: str) -> int:
    """The kind as csrc/math.h counts them."""
    if kind not in _NUMBERS:
        raise InputError("activation kind", expected=f"one of {[*_NUMBERS]}", got=repr(kind))
    return _NUMBERS[kind]


def forward(kind: str, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.activation.forward."""
    shape = x.shape
    y, dy = empty_like(x), None if dx is None else empty_like(x)
    library().activation_forward(
        number(kind), x.numel(), address("x", x, shape), address("dx", dx, shape),
        y.data_ptr(), address("dy", dy, shape), threads(),
    )  # fmt: skip
    return y, dy


def _slope(kind: str, x: Tensor, dx: Tensor | None, name: str, v: Tensor) -> Tensor:
    out = empty_like(x)
    library().activation_slope(
        number(kind), x.numel(), address("x", x, x.shape), address("dx", dx, x.shape),
        address(name, v, x.shape), out.data_ptr(), threads(),
    )  # fmt: skip
    return out


def backward(kind: str, x: Tensor, g: Tensor) -> Tensor:
    """See fda_fast.ops.activation.backward."""
    return _slope(kind, x, None, "g", g)


def tangent(kind: str, x: Tensor, t: Tensor) -> Tensor:
    """See fda_fast.ops.activation.tangent."""
    return _slope(kind, x, None, "t", t)


def adjoint(kind: str, x: Tensor, dx: Tensor | None, b: Tensor) -> Tensor:
    """See fda_fast.ops.activation.adjoint."""
    return _slope(kind, x, dx, "b", b)


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
    shape = x.shape
    S_x, b_x = empty_like(x), empty_like(x) if need_b else None
    if g is None:
        t = None
    library().activation_reverse(
        number(kind), x.numel(), address("x", x, shape), address("dx", dx, shape),
        address("g", None if t is None else g, shape), address("t", t, shape),
        address("S", S, shape), address("b", b, shape),
        S_x.data_ptr(), address("b_x", b_x, shape), threads(),
    )  # fmt: skip
    return S_x, b_x
