"""LayerNorm and RMSNorm in C++; see fda_fast.ops.norm. Row statistics in float64."""

from __future__ import annotations

from torch import Tensor

from fda_fast.ops.memory import empty, empty_like
from fda_fast.ops.native.call import address, library, threads

# kNormRows of csrc/cpu/norm_backward.h.
_GROUP_ROWS = 32


def _centered(kind: str) -> int:
    assert kind in ("layer", "rms"), kind
    return int(kind == "layer")


def forward(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tw: Tensor | None,
    tb: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.norm.forward."""
    tasks, rows, d = x.shape
    exact = dx is None and tw is None and tb is None
    y, dy = empty_like(x), None if exact else empty_like(x)
    if x.numel():
        library().norm_forward(
            _centered(kind), tasks, rows, d, address("x", x, x.shape),
            address("dx", dx, x.shape), address("weight", weight, (d,)),
            address("bias", bias, (d,)), address("tw", tw, (tasks, d)),
            address("tb", tb, (tasks, d)), eps, y.data_ptr(), address("dy", dy, x.shape),
            threads(),
        )  # fmt: skip
    return y, dy


def backward(
    kind: str,
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    eps: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See fda_fast.ops.norm.backward."""
    return adjoint(kind, x, None, g, weight, None, eps, need_input, need_weight, need_bias)


def tangent(
    kind: str,
    x: Tensor,
    t: Tensor | None,
    weight: Tensor | None,
    mw: Tensor | None,
    mb: Tensor | None,
    eps: float,
) -> Tensor | None:
    """See fda_fast.ops.norm.tangent."""
    if t is None and mw is None and mb is None:
        return None
    tasks, rows, d = x.shape
    out = empty_like(x)
    if x.numel():
        library().norm_tangent(
            _centered(kind), tasks, rows, d, address("x", x, x.shape), address("t", t, x.shape),
            address("weight", weight, (d,)), address("mw", mw, (tasks, d)),
            address("mb", mb, (tasks, d)), eps, out.data_ptr(), threads(),
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
    weight: Tensor | None,
    tw: Tensor | None,
    mw: Tensor | None,
    eps: float,
    need_b: bool,
) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.norm.reverse."""
    tasks, rows, d = x.shape
    S_x, b_x = empty_like(x), empty_like(x) if need_b else None
    if x.numel():
        library().norm_reverse(
            _centered(kind), tasks, rows, d, address("x", x, x.shape),
            address("dx", dx, x.shape), address("g", g, x.shape), address("t", t, x.shape),
            address("S", S, x.shape), address("b", b, x.shape),
            address("weight", weight, (d,)), address("tw", tw, (tasks, d)),
            address("mw", mw, (tasks, d)), eps, S_x.data_ptr(), address("b_x", b_x, x.shape),
            threads(),
        )  # fmt: skip
    return S_x, b_x


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See fda_fast.ops.norm.adjoint."""
    tasks, rows, d = x.shape
    b_x = empty_like(x) if need_input else None
    grad_weight = empty((tasks, d), x) if need_weight else None
    grad_bias = empty((tasks, d), x) if need_bias else None
    if not x.numel():
        for out in (grad_weight, grad_bias):
            if out is not None:
                out.zero_()
        return b_x, grad_weight, grad_bias
    partial = None
    shape = (tasks, -(-rows // _GROUP_ROWS), 2, d)
    if need_weight or need_bias:
        partial = empty(shape, x)
    if need_input or need_weight or need_bias:
        library().norm_backward(
            _centered(kind), tasks, rows, d, address("x", x, x.shape),
            address("dx", dx, x.shape), address("b", b, x.shape),
            address("weight", weight, (d,)), address("tw", tw, (tasks, d)), eps,
            address("b_x", b_x, x.shape), address("grad_weight", grad_weight, (tasks, d)),
            address("grad_bias", grad_bias, (tasks, d)), address("partial", partial, shape),
            threads(),
        )  # fmt: skip
    return b_x, grad_weight, grad_bias
