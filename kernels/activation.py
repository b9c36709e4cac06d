"""Activation phi, four sweeps: y = phi(x) elementwise, one pass over each tensor.

    forward   y = phi(x)             dy = phi(x + dx) - phi(x)
    backward  g_x = phi'(x) g        tangent  t_y = phi'(x) t
    reverse   S_x = phi'(x) S + (phi'(x + dx) - phi'(x)) b + phi''(x) g t
              b_x = phi'(x + dx) b

Storage float32 or bfloat16, arithmetic float32 in registers; outputs in the dtype of x.
"""

import torch
import triton
import triton.language as tl

from fda_fast.ops import memory

from . import launch
from .scalar import derivatives, differences


@triton.jit
def _activation_forward_kernel(
    x_ptr,
    dx_ptr,
    y_ptr,
    dy_ptr,
    numel,
    KIND: tl.constexpr,
    HAS_DX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of x, dx -> y, dy, all flat and contiguous [numel]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y, _, _ = derivatives(x, KIND)
    tl.store(y_ptr + offs, y, mask=mask)
    if HAS_DX:
        dx = tl.load(dx_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        _, _, dy, _ = differences(x, dx, KIND)
        tl.store(dy_ptr + offs, dy, mask=mask)


@triton.jit
def _activation_slope_kernel(
    x_ptr,
    dx_ptr,
    v_ptr,
    out_ptr,
    numel,
    KIND: tl.constexpr,
    HAS_DX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of out = phi'(x [+ dx]) v, all flat and contiguous [numel]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_DX:
        x += tl.load(dx_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    _, slope, _ = derivatives(x, KIND)
    tl.store(out_ptr + offs, slope * v, mask=mask)


@triton.jit
def _activation_reverse_kernel(
    x_ptr,
    dx_ptr,
    g_ptr,
    t_ptr,
    S_ptr,
    b_ptr,
    S_x_ptr,
    b_x_ptr,
    numel,
    KIND: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_T: tl.constexpr,
    HAS_B_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of the reverse sweep, all flat and contiguous [numel]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    S = tl.load(S_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    _, slope, curvature = derivatives(x, KIND)
    S_x = slope * S
    slope_f = slope
    if HAS_DX or HAS_B_X:
        b = tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_DX:
        dx = tl.load(dx_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        _, slope_f, _, dslope = differences(x, dx, KIND)
        S_x += dslope * b
    if HAS_T:
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        S_x += curvature * g * t
    tl.store(S_x_ptr + offs, S_x, mask=mask)
    if HAS_B_X:
        tl.store(b_x_ptr + offs, slope_f * b, mask=mask)


def _key(name: str, kind: str, x: torch.Tensor) -> tuple:
    return ("activation", name, kind, x.numel(), x.dtype, x.device)


def forward(kind, x, dx):
    """Value and difference; arguments and meaning of ``fda_fast.ops.activation.forward``."""
    y = memory.empty_like(x)
    dy = None if dx is None else memory.empty_like(x)

    def run(one: launch.Launch) -> None:
        _activation_forward_kernel[(triton.cdiv(x.numel(), one.block),)](
            x,
            dx,
            y,
            dy,
            x.numel(),
            KIND=kind,
            HAS_DX=dx is not None,
            BLOCK=one.block,
            **one.options(),
        )

    if x.numel():
        with launch.on(x):
            launch.pick(_key("forward", kind, x), launch.elementwise(x), run)
    return y, dy


def _slope(name, kind, x, dx, v):
    out = memory.empty_like(x)

    def run(one: launch.Launch) -> None:
        _activation_slope_kernel[(triton.cdiv(x.numel(), one.block),)](
            x,
            dx,
            v,
            out,
            x.numel(),
            KIND=kind,
            HAS_DX=dx is not None,
            BLOCK=one.block,
            **one.options(),
        )

    if x.numel():
        with launch.on(x):
            launch.pick(_key(name, kind, x), launch.elementwise(x), run)
    return out


def backward(kind, x, g):
    """phi'(x) g, as ``fda_fast.ops.activation.backward``."""
    return _slope("slope", kind, x, None, g)


def tangent(kind, x, t):
    """phi'(x) t, as ``fda_fast.ops.activation.tangent``."""
    return _slope("slope", kind, x, None, t)


def adjoint(kind, x, dx, b):
    """phi'(x + dx) b, as ``fda_fast.ops.activation.adjoint``."""
    return _slope("adjoint", kind, x, dx, b)


def reverse(kind, x, dx, g, t, S, b, need_b):
    """S_x and b_x, as ``fda_fast.ops.activation.reverse``."""
    S_x = memory.empty_like(x)
    b_x = memory.empty_like(x) if need_b else None

    def run(one: launch.Launch) -> None:
        _activation_reverse_kernel[(triton.cdiv(x.numel(), one.block),)](
            x,
            dx,
            g,
            t,
            S,
            b,
            S_x,
            b_x,
            x.numel(),
            KIND=kind,
            HAS_DX=dx is not None,
            HAS_T=t is not None and g is not None,
            HAS_B_X=need_b,
            BLOCK=one.block,
            **one.options(),
        )

    if x.numel():
        with launch.on(x):
            launch.pick(_key("reverse", kind, x), launch.elementwise(x, wide=True), run)
    return S_x, b_x
