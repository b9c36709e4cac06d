"""Alignment of gradients with task vectors: segment sums, and mixes with segment coefficients.

A linear layer packs several parameters along its output, [K, R, o]: segment s owns widths[s]
columns. Sums are taken in two passes, each in a fixed order, so results repeat bit for bit.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from fda_fast.ops import memory

from . import launch

# A program of the first pass adds about this many elements; fixed, so the order is.
CHUNK_ELEMENTS = 32768


@cache
def _starts(widths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """First column of every segment and the end, int32 [S + 1], copied to the device once.

    Never dropped: a recorded graph reads it for as long as it lives.
    """
    starts = [0]
    for width in widths:
        starts.append(starts[-1] + width)
    return torch.tensor(starts, dtype=torch.int32, device=device)


@triton.jit
def _alignment_partial_kernel(
    g_ptr, u_ptr, v_ptr, starts_ptr, partial_ptr,
    rows, width, rows_per_chunk, n_chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of rows of one segment of one task.

    partial [2, K, S, n_chunks] receives the sums of g u and of g v.
    """
    chunk = tl.program_id(0)
    segment = tl.program_id(1)
    task = tl.program_id(2).to(tl.int64)
    first = tl.load(starts_ptr + segment)
    last = tl.load(starts_ptr + segment + 1)
    gu = tl.zeros([BLOCK], dtype=tl.float32)
    gv = tl.zeros([BLOCK], dtype=tl.float32)
    row = chunk * rows_per_chunk
    for i in range(row, min(row + rows_per_chunk, rows)):
        base = (task * rows + i) * width
        for start in range(first, last, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < last
            g = tl.load(g_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
            gu += g * tl.load(u_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
            gv += g * tl.load(v_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    n_segments = tl.num_programs(1)
    at = partial_ptr + (task * n_segments + segment) * n_chunks + chunk
    tl.store(at, tl.sum(gu, 0))
    tl.store(at + tl.num_programs(2).to(tl.int64) * n_segments * n_chunks, tl.sum(gv, 0))


@triton.jit
def segment_value(
    values_ptr, stride_task, stride_segment, task, starts_ptr, offs, n_segments,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The coefficient [K, S] of the segment that each column of ``offs`` belongs to."""
    out = tl.zeros([BLOCK], dtype=tl.float32)
    for s in range(n_segments):
        first = tl.load(starts_ptr + s)
        value = tl.load(values_ptr + task * stride_task + s * stride_segment).to(tl.float32)
        out = tl.where(offs >= first, value, out)
    return out


@triton.jit
def _alignment_mix_kernel(
    alpha_ptr, u_ptr, beta_ptr, v_ptr, row_ptr, starts_ptr, out_ptr,
    rows, width, n_segments,
    stride_alpha_task, stride_alpha_segment, stride_beta_task, stride_beta_segment,
    HAS_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one row of alpha u + beta v + row; row [K, width]."""
    index = tl.program_id(0).to(tl.int64)
    task = index // rows
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    at = index * width + offs
    alpha = segment_value(
        alpha_ptr,
        stride_alpha_task,
        stride_alpha_segment,
        task,
        starts_ptr,
        offs,
        n_segments,
        BLOCK,
    )
    beta = segment_value(
        beta_ptr, stride_beta_task, stride_beta_segment, task, starts_ptr, offs, n_segments, BLOCK
    )
    out = beta * tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out += alpha * tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ROW:
        out += tl.load(row_ptr + task * width + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out, mask=mask)


@triton.jit
def _alignment_coefficients_kernel(
    dots_ptr, squares_ptr, active_ptr, loss_ptr, cosines_ptr, out_ptr,
    n_tasks, n_terms, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one task. dots, out [2, K, P]; squares, cosines [K, P]; active [P]; loss [K]."""
    task = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < n_terms
    at = task * n_terms + offs
    other = n_tasks * n_terms
    dot = tl.load(dots_ptr + at, mask=mask, other=0.0).to(tl.float32)
    square = tl.load(dots_ptr + other + at, mask=mask, other=0.0).to(tl.float32)
    norm_t = tl.sqrt_rn(tl.load(squares_ptr + at, mask=mask, other=0.0).to(tl.float32))
    active = tl.load(active_ptr + offs, mask=mask, other=0) != 0
    norm_g = tl.sqrt_rn(tl.where(square < 0, 0.0, square))
    # A NaN must reach the loss: max would drop it.
    floored_g = tl.where(norm_g < eps, eps, norm_g)
    floored_t = tl.where(norm_t < 1e-8, 1e-8, norm_t)
    used = active & (norm_t > 0)
    product = floored_g * floored_t
    cosine = tl.where(used, dot / product, 0.0)
    alpha = tl.where(used, -1.0 / product, 0.0)
    beta = cosine / tl.where(norm_g == 0, 1.0, floored_g * norm_g)
    beta = tl.where(norm_g == 0, 0.0, beta)
    tl.store(cosines_ptr + at, cosine, mask=mask)
    tl.store(out_ptr + at, alpha, mask=mask)
    tl.store(out_ptr + other + at, beta, mask=mask)
    tl.store(loss_ptr + task, tl.sum(tl.where(mask, 1.0 - cosine, 0.0), 0))


def dots(g, u, v, widths):
    """[2, K, S], as ``fda_fast.ops.alignment.dots``; float32 whatever the storage of g."""
    tasks, rows, width = g.shape
    segments = len(widths)
    if g.numel() == 0:
        return torch.zeros((2, tasks, segments), dtype=torch.float32, device=g.device)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // max(widths))
    chunks = triton.cdiv(rows, rows_per_chunk)
    partial = memory.empty((2, tasks, segments, chunks), g, torch.float32)
    one = launch.REDUCTION[launch.architecture(g)][0]
    with launch.on(g):
        _alignment_partial_kernel[(chunks, segments, tasks)](
            g, u, v, _starts(tuple(widths), g.device), partial,
            rows, width, rows_per_chunk, chunks, BLOCK=one.block, **one.options(),
        )  # fmt: skip
        return partial.sum(-1)


def _elementwise(kernel, like, pointers, alpha, beta, **flags) -> None:
    """Launch over every row and block of columns of ``like`` [K, R, o]; alpha, beta any strides."""
    tasks, rows, width = like.shape
    one = launch.elementwise(like)[0]
    with launch.on(like):
        kernel[(tasks * rows, triton.cdiv(width, one.block))](
            *pointers,
            rows,
            width,
            alpha.shape[1],
            *alpha.stride(),
            *beta.stride(),
            **flags,
            BLOCK=one.block,
            **one.options(),
        )


def mix(alpha, u, beta, v, widths, row):
    """alpha u + beta v + row [K, R, o], as ``fda_fast.ops.alignment.mix``."""
    out = memory.empty_like(v)
    if v.numel():
        pointers = (alpha, u, beta, v, row, _starts(tuple(widths), v.device), out)
        _elementwise(_alignment_mix_kernel, v, pointers, alpha, beta, HAS_ROW=row is not None)
    return out


def coefficients(dots, squares, active, eps):
    """loss [K], cosines [K, P], [2, K, P]; as ``fda_fast.ops.alignment.coefficients``."""
    _, tasks, terms = dots.shape
    loss = memory.empty((tasks,), dots)
    cosines, out = memory.empty((tasks, terms), dots), memory.empty_like(dots)
    if tasks:
        with launch.on(dots):
            _alignment_coefficients_kernel[(tasks,)](
                dots, squares, active, loss, cosines, out, tasks, terms, eps,
                BLOCK=max(16, triton.next_power_of_2(terms)), num_warps=1,
            )  # fmt: skip
    return loss, cosines, out
