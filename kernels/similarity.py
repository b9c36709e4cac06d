"""Feature similarity of y and y + dy, [K, A, D]: two passes, sums in a fixed order.

An anchor's row may be long (tokens times width), so it is cut into segments of columns. Pass 1
leaves one partial sum per row and segment; pass 2 adds the partial sums of its row, always in the
same order, and writes the elementwise results. Cosine, per row, with n1 = |y|, n2 = |y + dy|,
h = y / n1, h_f = (y + dy) / n2, r = (dy - (h.dy) h) / n2, w = scale / A:

    forward   s = w sum_rows h.h_f          g = w r / n1
    reverse   q = w t / n1                  Pq = q - (q.h) h
              b = (Pq - (Pq.h_f) h_f) / n2
              S = -(h.dy) / (n1 n2) Pq - (q.r) (h_f / n2 + h / n1) - (q.h) r / n1

All inner products follow from |y|^2, |y + dy|^2, y.dy, t.y and t.dy.
"""

import torch
import triton
import triton.language as tl

from fda_fast.ops import memory

from . import launch

# F.cosine_similarity's floor of each norm.
EPS = tl.constexpr(1e-8)
COLUMNS = 1024


@triton.jit
def _similarity_partial_kernel(
    y_ptr, dy_ptr, t_ptr, partial_ptr,
    width, segment, n_segments,
    KIND: tl.constexpr, HAS_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one segment of one row; its sums to partial [5, rows, n_segments]."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    n_rows = tl.num_programs(0).to(tl.int64)
    first = which * segment
    last = min(first + segment, width)
    base = row * width
    yy = tl.zeros([BLOCK], dtype=tl.float32)
    ff = tl.zeros([BLOCK], dtype=tl.float32)
    yd = tl.zeros([BLOCK], dtype=tl.float32)
    ty = tl.zeros([BLOCK], dtype=tl.float32)
    td = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < last
        dy = tl.load(dy_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
        if KIND == "l2":
            yy += dy * dy
        elif KIND == "l1":
            yy += tl.abs(dy)
        else:
            y = tl.load(y_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
            yy += y * y
            ff += (y + dy) * (y + dy)
            yd += y * dy
            if HAS_T:
                t = tl.load(t_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
                ty += t * y
                td += t * dy
    at = partial_ptr + row * n_segments + which
    stride = n_rows * n_segments
    tl.store(at, tl.sum(yy, 0))
    if KIND == "cosine":
        tl.store(at + stride, tl.sum(ff, 0))
        tl.store(at + 2 * stride, tl.sum(yd, 0))
        if HAS_T:
            tl.store(at + 3 * stride, tl.sum(ty, 0))
            tl.store(at + 4 * stride, tl.sum(td, 0))


@triton.jit
def row_sum(partial_ptr, row, n_rows, which, n_segments, SEGMENTS: tl.constexpr):
    """Sum ``which`` of a row over its segments."""
    offs = tl.arange(0, SEGMENTS)
    at = partial_ptr + (which * n_rows + row) * n_segments + offs
    return tl.sum(tl.load(at, mask=offs < n_segments, other=0.0), 0)


@triton.jit
def _similarity_forward_kernel(
    y_ptr, dy_ptr, partial_ptr, cos_ptr, g_ptr,
    width, n_segments, weight,
    KIND: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one row of g; block 0 writes the row's cosine [rows]."""
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    at = row * width + offs
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if KIND == "l2":
        g = 2.0 * weight * dy
    elif KIND == "l1":
        g = weight * (tl.where(dy > 0, 1.0, 0.0) - tl.where(dy < 0, 1.0, 0.0))
    else:
        yy = row_sum(partial_ptr, row, n_rows, 0, n_segments, SEGMENTS)
        ff = row_sum(partial_ptr, row, n_rows, 1, n_segments, SEGMENTS)
        yd = row_sum(partial_ptr, row, n_rows, 2, n_segments, SEGMENTS)
        n1 = tl.maximum(tl.sqrt_rn(yy), EPS)
        n2 = tl.maximum(tl.sqrt_rn(ff), EPS)
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = weight / n1 * ((dy - (yd / n1) * (y / n1)) / n2)
        if tl.program_id(1) == 0:
            tl.store(cos_ptr + row, ((yy + yd) / n1) / n2)
    tl.store(g_ptr + at, g, mask=mask)


@triton.jit
def _similarity_reverse_kernel(
    y_ptr, dy_ptr, t_ptr, partial_ptr, S_ptr, b_ptr,
    width, n_segments, weight,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one row of S and b (cosine)."""
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    at = row * width + offs
    yy = row_sum(partial_ptr, row, n_rows, 0, n_segments, SEGMENTS)
    ff = row_sum(partial_ptr, row, n_rows, 1, n_segments, SEGMENTS)
    yd = row_sum(partial_ptr, row, n_rows, 2, n_segments, SEGMENTS)
    ty = row_sum(partial_ptr, row, n_rows, 3, n_segments, SEGMENTS)
    td = row_sum(partial_ptr, row, n_rows, 4, n_segments, SEGMENTS)
    norm = tl.sqrt_rn(yy)
    n1 = tl.maximum(norm, EPS)
    n2 = tl.maximum(tl.sqrt_rn(ff), EPS)
    along = yd / n1
    to_q = weight / n1
    q_h = to_q * (ty / n1)
    q_r = (to_q * td - along * q_h) / n2
    # Pq.h_f is q.r as long as h is a unit vector; below the floor of the norm it is not.
    Pq_hf = q_r + tl.where(norm < n1, q_h * (n1 - yy / n1) / n2, 0.0)

    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32)
    h = y / n1
    h_f = (y + dy) / n2
    r = (dy - along * h) / n2
    Pq = to_q * t - q_h * h
    S = -along / n1 / n2 * Pq - q_r * (h_f / n2 + h / n1) - q_h * r / n1
    tl.store(S_ptr + at, S, mask=mask)
    tl.store(b_ptr + at, (Pq - Pq_hf * h_f) / n2, mask=mask)


def _partial(kind, y, dy, t):
    """Partial sums [5, rows, segments] float32 and the number of segments."""
    tasks, anchors, width = y.shape
    segments = triton.cdiv(width, launch.SEGMENT)
    partial = memory.empty((5, tasks * anchors, segments), y, torch.float32)
    one = launch.REDUCTION[launch.architecture(y)][0]
    _similarity_partial_kernel[(tasks * anchors, segments)](
        y, dy, t, partial, width, launch.SEGMENT, segments,
        KIND=kind, HAS_T=t is not None, BLOCK=one.block, **one.options(),
    )  # fmt: skip
    return partial, segments


def forward(kind, y, dy, scale):
    """s [K] in float32, g [K, A, D]; arguments of ``fda_fast.ops.similarity.forward``."""
    tasks, anchors, width = y.shape
    g = memory.empty_like(y)
    if y.numel() == 0:
        return torch.zeros(tasks, dtype=torch.float32, device=y.device), g
    cosine = kind == "cosine"
    weight = scale / anchors if cosine else scale / (anchors * width)
    cos = memory.empty((tasks * anchors,), y, torch.float32) if cosine else None
    with launch.on(y):
        partial, segments = _partial(kind, y, dy, None)
        _similarity_forward_kernel[(tasks * anchors, triton.cdiv(width, COLUMNS))](
            y, dy, partial, cos, g, width, segments, weight,
            KIND=kind, SEGMENTS=triton.next_power_of_2(segments), BLOCK=COLUMNS, num_warps=4,
        )  # fmt: skip
        if cosine:
            s = weight * cos.view(tasks, anchors).sum(1)
        else:
            s = -weight * partial[0].view(tasks, -1).sum(1)
    return s, g


def reverse(kind, y, dy, t, scale):
    """S and b [K, A, D], as ``fda_fast.ops.similarity.reverse``."""
    tasks, anchors, width = y.shape
    if kind == "l1" or y.numel() == 0:
        return torch.zeros_like(t), torch.zeros_like(t)
    if kind == "l2":
        return torch.zeros_like(t), 2 * scale / (anchors * width) * t
    S, b = memory.empty_like(y), memory.empty_like(y)
    with launch.on(y):
        partial, segments = _partial(kind, y, dy, t)
        _similarity_reverse_kernel[(tasks * anchors, triton.cdiv(width, COLUMNS))](
            y, dy, t, partial, S, b, width, segments, scale / anchors,
            SEGMENTS=triton.next_power_of_2(segments), BLOCK=COLUMNS, num_warps=4,
        )  # fmt: skip
    return S, b
