"""LayerNorm ("layer") and RMSNorm ("rms") with task vectors, four sweeps.

With xc = x - mean(x) (x itself for "rms"), rho = 1 / sqrt(mean(xc^2) + eps), xh = rho xc, the
Jacobian of xh is the symmetric map A(h) = rho (center(h) - xh mean(h xh)), and y = w xh + c:

    forward   dy = w (xh_f - xh) + tw xh_f + tb
    backward  g_x = A(w g)             g_w = sum_rows g xh          g_c = sum_rows g
    tangent   t_y = w A(t) + mw xh + mb
    reverse   S_x = A(w S + mw g) + (A_f - A)(w b) + A_f(tw b) + d/dx <w g, A(t)>
              b_x = A_f((w + tw) b)

xh_f - xh comes from the step of the variance, mean(dxc (2 xc + dxc)), so nothing cancels. Rows too
wide for one program's registers go to the torch twin, except in the reverse sweep.
"""

import torch
import triton
import triton.language as tl

from fda_fast.ops import memory
from fda_fast.ops.reference import norm as twin

from . import launch, norm_reverse
from .scalar import scale_step

# Rows are summed into at most this many partial sums per task: fixed, so that the order of the
# additions depends on the shape alone.
CHUNKS = 256


@triton.jit
def center(x, mask, width, LAYER: tl.constexpr):
    """x minus its mean over the row (for "layer"), zero outside the row."""
    if LAYER:
        x -= tl.sum(x, 0) / width
    return tl.where(mask, x, 0.0)


@triton.jit
def _norm_forward_kernel(
    x_ptr, dx_ptr, weight_ptr, bias_ptr, tw_ptr, tb_ptr, y_ptr, dy_ptr,
    rows, width, eps,
    LAYER: tl.constexpr, HAS_DX: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TW: tl.constexpr, HAS_TB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row of x, dx [K * rows, width]; tw, tb [K, width] of its task."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    at = row * width + offs
    task = row // rows * width + offs
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    xc = center(x, mask, width, LAYER)
    rho = 1.0 / tl.sqrt_rn(tl.sum(xc * xc, 0) / width + eps)
    xh_f = xc * rho
    y = xh_f
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y *= weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y, mask=mask)
    if HAS_DX or HAS_TW or HAS_TB:
        dy = tl.zeros([BLOCK], dtype=tl.float32)
        if HAS_DX:
            dx = tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dxc = center(dx, mask, width, LAYER)
            rho_f, d_rho = scale_step(rho, tl.sum(dxc * (2.0 * xc + dxc), 0) / width)
            dy = dxc * rho_f + xc * d_rho
            xh_f += dy
            if HAS_WEIGHT:
                dy *= weight
        if HAS_TW:
            dy += xh_f * tl.load(tw_ptr + task, mask=mask, other=0.0).to(tl.float32)
        if HAS_TB:
            dy += tl.load(tb_ptr + task, mask=mask, other=0.0).to(tl.float32)
        tl.store(dy_ptr + at, dy, mask=mask)


@triton.jit
def _norm_backward_kernel(
    x_ptr, dx_ptr, g_ptr, weight_ptr, tw_ptr, g_x_ptr, g_weight_ptr, g_bias_ptr,
    rows, width, eps, chunks, rows_per_chunk,
    LAYER: tl.constexpr, HAS_DX: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_TW: tl.constexpr,
    NEED_INPUT: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of rows of one task, normalised at x [+ dx], weight w [+ tw].

    g_x [K * rows, width]; g_weight, g_bias [K, chunks, width] are partial sums over the chunk.
    """
    chunk = tl.program_id(0).to(tl.int64)
    task = chunk // chunks
    first = (chunk % chunks) * rows_per_chunk
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    weight = tl.full([BLOCK], 1.0, dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_TW:
        weight += tl.load(tw_ptr + task * width + offs, mask=mask, other=0.0).to(tl.float32)
    g_weight = tl.zeros([BLOCK], dtype=tl.float32)
    g_bias = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(first, min(first + rows_per_chunk, rows)):
        at = (task * rows + row) * width + offs
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if NEED_INPUT or NEED_WEIGHT:
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if HAS_DX:
                x += tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)
            xc = center(x, mask, width, LAYER)
            rho = 1.0 / tl.sqrt_rn(tl.sum(xc * xc, 0) / width + eps)
            xh = xc * rho
            g_weight += g * xh
        if NEED_INPUT:
            h = g * weight
            g_x = rho * (center(h, mask, width, LAYER) - xh * (tl.sum(h * xh, 0) / width))
            tl.store(g_x_ptr + at, g_x, mask=mask)
        g_bias += g
    if NEED_WEIGHT:
        tl.store(g_weight_ptr + chunk * width + offs, g_weight, mask=mask)
    if NEED_BIAS:
        tl.store(g_bias_ptr + chunk * width + offs, g_bias, mask=mask)


@triton.jit
def _norm_tangent_kernel(
    x_ptr, t_ptr, weight_ptr, mw_ptr, mb_ptr, t_y_ptr,
    rows, width, eps,
    LAYER: tl.constexpr, HAS_T: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_MW: tl.constexpr,
    HAS_MB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row of x, t [K * rows, width]; mw, mb [K, width] of its task."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    at = row * width + offs
    task = row // rows * width + offs
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    xc = center(x, mask, width, LAYER)
    rho = 1.0 / tl.sqrt_rn(tl.sum(xc * xc, 0) / width + eps)
    xh = xc * rho
    t_y = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_T:
        t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32)
        t_y = rho * (center(t, mask, width, LAYER) - xh * (tl.sum(t * xh, 0) / width))
        if HAS_WEIGHT:
            t_y *= tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_MW:
        t_y += xh * tl.load(mw_ptr + task, mask=mask, other=0.0).to(tl.float32)
    if HAS_MB:
        t_y += tl.load(mb_ptr + task, mask=mask, other=0.0).to(tl.float32)
    tl.store(t_y_ptr + at, t_y, mask=mask)


def _rows(kernel, x: torch.Tensor, pointers: tuple, eps: float, **flags) -> None:
    """Launch a kernel with one program per row of x [K, R, d]."""
    tasks, rows, width = x.shape
    one = launch.row(width)
    with launch.on(x):
        kernel[(tasks * rows,)](
            *pointers, rows, width, eps, **flags, BLOCK=one.block, **one.options()
        )


def forward(kind, x, dx, weight, bias, tw, tb, eps):
    """Value and difference; arguments and meaning of ``fda_fast.ops.norm.forward``."""
    if x.shape[-1] > launch.WIDEST_ROW:
        return twin.forward(kind, x, dx, weight, bias, tw, tb, eps)
    y = memory.empty_like(x)
    has_dy = any(one is not None for one in (dx, tw, tb))
    dy = memory.empty_like(x) if has_dy else None
    if x.numel():
        _rows(
            _norm_forward_kernel, x, (x, dx, weight, bias, tw, tb, y, dy), eps,
            LAYER=kind == "layer", HAS_DX=dx is not None, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, HAS_TW=tw is not None, HAS_TB=tb is not None,
        )  # fmt: skip
    return y, dy


def backward(kind, x, g, weight, eps, need_input, need_weight, need_bias):
    """g_x [K, R, d], g_weight and g_bias [K, d], as ``fda_fast.ops.norm.backward``."""
    if x.shape[-1] > launch.WIDEST_ROW:
        return twin.backward(kind, x, g, weight, eps, need_input, need_weight, need_bias)
    return _cotangents(kind, x, None, g, weight, None, eps, need_input, need_weight, need_bias)


def adjoint(kind, x, dx, b, weight, tw, eps, need_input, need_weight, need_bias):
    """The same at x + dx and weight + tw, as ``fda_fast.ops.norm.adjoint``."""
    needs = (need_input, need_weight, need_bias)
    if x.shape[-1] > launch.WIDEST_ROW:
        return twin.adjoint(kind, x, dx, b, weight, tw, eps, *needs)
    return _cotangents(kind, x, dx, b, weight, tw, eps, *needs)


def _cotangents(kind, x, dx, g, weight, tw, eps, need_input, need_weight, need_bias):
    tasks, rows, width = x.shape
    rows_per_chunk = triton.cdiv(rows, CHUNKS)
    chunks = triton.cdiv(rows, rows_per_chunk) if rows else 0
    g_x = memory.empty_like(x) if need_input else None
    partial = [
        memory.empty((tasks, chunks, width), x, torch.float32) if need else None
        for need in (need_weight, need_bias)
    ]
    if x.numel() and (need_input or need_weight or need_bias):
        one = launch.row(width)
        with launch.on(x):
            _norm_backward_kernel[(tasks * chunks,)](
                x, dx, g, weight, tw, g_x, *partial,
                rows, width, eps, chunks, rows_per_chunk,
                LAYER=kind == "layer", HAS_DX=dx is not None, HAS_WEIGHT=weight is not None,
                HAS_TW=tw is not None, NEED_INPUT=need_input, NEED_WEIGHT=need_weight,
                NEED_BIAS=need_bias, BLOCK=one.block, **one.options(),
            )  # fmt: skip
    return g_x, *(None if part is None else part.sum(1).to(x.dtype) for part in partial)


def tangent(kind, x, t, weight, mw, mb, eps):
    """t_y, or None where it is exactly zero, as ``fda_fast.ops.norm.tangent``."""
    if t is None and mw is None and mb is None:
        return None
    if x.shape[-1] > launch.WIDEST_ROW:
        return twin.tangent(kind, x, t, weight, mw, mb, eps)
    t_y = memory.empty_like(x)
    if x.numel():
        _rows(
            _norm_tangent_kernel, x, (x, t, weight, mw, mb, t_y), eps,
            LAYER=kind == "layer", HAS_T=t is not None, HAS_WEIGHT=weight is not None,
            HAS_MW=mw is not None, HAS_MB=mb is not None,
        )  # fmt: skip
    return t_y


def reverse(kind, x, dx, g, t, S, b, weight, tw, mw, eps, need_b):
    """S_x and b_x, as ``fda_fast.ops.norm.reverse``."""
    S_x = memory.empty_like(x)
    b_x = memory.empty_like(x) if need_b else None
    if x.numel():
        norm_reverse.run(kind == "layer", x, dx, g, t, S, b, weight, tw, mw, S_x, b_x, eps)
    return S_x, b_x
