"""Gated activation y = phi(gate) up, four sweeps, on packed rows [gate | up].

With (a, u) = (gate, up), differences da, du, and a_f = a + da, u_f = u + du:

    forward   y = phi(a) u      dy = (phi(a_f) - phi(a)) u_f + phi(a) du
    backward  g_a = phi'(a) u g        g_u = phi(a) g
    tangent   t_y = phi'(a) u t_a + phi(a) t_u
    reverse   S_a = phi'(a) u S + (phi'(a_f) u_f - phi'(a) u) b + g (phi''(a) u t_a + phi'(a) t_u)
              S_u = phi(a) S + (phi(a_f) - phi(a)) b + g phi'(a) t_a
              b_a = phi'(a_f) u_f b    b_u = phi(a_f) b
"""

import torch
import triton
import triton.language as tl

from fda_fast.ops import memory

from . import launch
from .scalar import derivatives, differences


@triton.jit
def _gated_forward_kernel(
    x_ptr,
    dx_ptr,
    y_ptr,
    dy_ptr,
    width,
    KIND: tl.constexpr,
    HAS_DX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one row; x, dx [rows, 2 width] -> y, dy [rows, width]."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    gate = row * 2 * width + offs
    a = tl.load(x_ptr + gate, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
    phi, _, _ = derivatives(a, KIND)
    tl.store(y_ptr + row * width + offs, phi * u, mask=mask)
    if HAS_DX:
        da = tl.load(dx_ptr + gate, mask=mask, other=0.0).to(tl.float32)
        du = tl.load(dx_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
        _, _, dphi, _ = differences(a, da, KIND)
        tl.store(dy_ptr + row * width + offs, dphi * (u + du) + phi * du, mask=mask)


@triton.jit
def _gated_backward_kernel(
    x_ptr,
    dx_ptr,
    g_ptr,
    g_x_ptr,
    width,
    KIND: tl.constexpr,
    HAS_DX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one row of J(x [+ dx])^T g; g [rows, width]."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    gate = row * 2 * width + offs
    a = tl.load(x_ptr + gate, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * width + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_DX:
        a += tl.load(dx_ptr + gate, mask=mask, other=0.0).to(tl.float32)
        u += tl.load(dx_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
    phi, slope, _ = derivatives(a, KIND)
    tl.store(g_x_ptr + gate, slope * u * g, mask=mask)
    tl.store(g_x_ptr + gate + width, phi * g, mask=mask)


@triton.jit
def _gated_tangent_kernel(
    x_ptr,
    t_ptr,
    t_y_ptr,
    width,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one row of J(x) t; t [rows, 2 width] -> t_y [rows, width]."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    gate = row * 2 * width + offs
    a = tl.load(x_ptr + gate, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
    t_a = tl.load(t_ptr + gate, mask=mask, other=0.0).to(tl.float32)
    t_u = tl.load(t_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
    phi, slope, _ = derivatives(a, KIND)
    tl.store(t_y_ptr + row * width + offs, slope * u * t_a + phi * t_u, mask=mask)


@triton.jit
def _gated_reverse_kernel(
    x_ptr,
    dx_ptr,
    g_ptr,
    t_ptr,
    S_ptr,
    b_ptr,
    S_x_ptr,
    b_x_ptr,
    width,
    KIND: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_T: tl.constexpr,
    HAS_B_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one row of the reverse sweep; g, S, b [rows, width]."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    gate = row * 2 * width + offs
    flat = row * width + offs
    a = tl.load(x_ptr + gate, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
    S = tl.load(S_ptr + flat, mask=mask, other=0.0).to(tl.float32)
    phi, slope, curvature = derivatives(a, KIND)
    S_a = slope * u * S
    S_u = phi * S
    phi_f = phi
    slope_f = slope
    u_f = u
    if HAS_DX or HAS_B_X:
        b = tl.load(b_ptr + flat, mask=mask, other=0.0).to(tl.float32)
    if HAS_DX:
        da = tl.load(dx_ptr + gate, mask=mask, other=0.0).to(tl.float32)
        du = tl.load(dx_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
        phi_f, slope_f, dphi, dslope = differences(a, da, KIND)
        u_f = u + du
        S_a += (dslope * u_f + slope * du) * b
        S_u += dphi * b
    if HAS_T:
        g = tl.load(g_ptr + flat, mask=mask, other=0.0).to(tl.float32)
        t_a = tl.load(t_ptr + gate, mask=mask, other=0.0).to(tl.float32)
        t_u = tl.load(t_ptr + gate + width, mask=mask, other=0.0).to(tl.float32)
        S_a += g * (curvature * u * t_a + slope * t_u)
        S_u += g * slope * t_a
    tl.store(S_x_ptr + gate, S_a, mask=mask)
    tl.store(S_x_ptr + gate + width, S_u, mask=mask)
    if HAS_B_X:
        tl.store(b_x_ptr + gate, slope_f * u_f * b, mask=mask)
        tl.store(b_x_ptr + gate + width, phi_f * b, mask=mask)


def _run(kernel, x: torch.Tensor, tensors: tuple, wide: bool, **flags) -> None:
    """Launch over every row of x [..., 2 width]; ``tensors`` are the kernel's pointers."""
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width) if width else 0
    if rows == 0:
        return

    def run(one: launch.Launch) -> None:
        kernel[(rows, triton.cdiv(width, one.block))](
            *tensors, width, **flags, BLOCK=one.block, **one.options()
        )

    key = (kernel.fn.__name__, *sorted(flags.items()), x.shape, x.dtype, x.device)
    with launch.on(x):
        launch.pick(key, launch.elementwise(x, wide=wide), run)


def _half(x: torch.Tensor) -> torch.Tensor:
    return memory.empty((*x.shape[:-1], x.shape[-1] // 2), x)


def forward(kind, x, dx):
    """Value and difference; arguments and meaning of ``fda_fast.ops.gated.forward``."""
    y = _half(x)
    dy = None if dx is None else _half(x)
    _run(_gated_forward_kernel, x, (x, dx, y, dy), True, KIND=kind, HAS_DX=dx is not None)
    return y, dy


def backward(kind, x, g):
    """J(x)^T g, as ``fda_fast.ops.gated.backward``."""
    g_x = memory.empty_like(x)
    _run(_gated_backward_kernel, x, (x, None, g, g_x), False, KIND=kind, HAS_DX=False)
    return g_x


def tangent(kind, x, t):
    """J(x) t, as ``fda_fast.ops.gated.tangent``."""
    t_y = _half(x)
    _run(_gated_tangent_kernel, x, (x, t, t_y), False, KIND=kind)
    return t_y


def adjoint(kind, x, dx, b):
    """J(x + dx)^T b, as ``fda_fast.ops.gated.adjoint``."""
    b_x = memory.empty_like(x)
    _run(_gated_backward_kernel, x, (x, dx, b, b_x), False, KIND=kind, HAS_DX=dx is not None)
    return b_x


def reverse(kind, x, dx, g, t, S, b, need_b):
    """S_x and b_x, as ``fda_fast.ops.gated.reverse``."""
    S_x = memory.empty_like(x)
    b_x = memory.empty_like(x) if need_b else None
    _run(
        _gated_reverse_kernel,
        x,
        (x, dx, g, t, S, b, S_x, b_x),
        True,
        KIND=kind,
        HAS_DX=dx is not None,
        HAS_T=t is not None and g is not None,
        HAS_B_X=need_b,
    )
    return S_x, b_x
