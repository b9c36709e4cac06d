"""Attention kernels: forward, first backward (also the adjoint), tangent.

Programs of *rows* own BLOCK queries of one head: outputs, cotangents of q, row statistics. Programs
of *columns* own BLOCK keys and values of one key head: their cotangents, summed over the queries of
every head that shares them. Each sweep leaves the row statistics that the later ones need
(attention_tiles), so none but the first repeats a softmax. All tensors [N, T, columns]; means
[N, columns]; statistics [N_STATISTICS, N * query heads, T].
"""

import triton
import triton.language as tl

from .attention_tiles import (
    INV,
    INV_F,
    LARGE,
    MAX,
    MAX_F,
    ME,
    MEAN_A,
    MEAN_AF,
    MEAN_T,
    MU,
    PLAIN,
    centred,
    mean_of,
    probabilities,
    probability_difference,
    scores,
    seen,
    statistic,
    store_statistic,
    store_tile,
    tile,
)
from .scalar import expm1


@triton.jit
def online_softmax(S, row_max, total):
    """Take a block of scores into the running maximum and sum; the old sum's factor; exp(S)."""
    new_max = tl.maximum(row_max, tl.max(S, 1))
    factor = tl.exp(row_max - new_max)
    p = tl.exp(S - new_max[:, None])
    return new_max, total * factor + tl.sum(p, 1), factor, p


@triton.jit
def reciprocal(total):
    """1 / total, and 0 for the rows beyond the sequence, which saw nothing."""
    return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def _attention_forward_kernel(
    x_ptr, dx_ptr, mean_ptr, dmean_ptr, y_ptr, dy_ptr, stats_ptr,
    n_heads, tokens, size, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """One rows program: y = P v, dy = dP v + P_f dv; statistics MAX to ME."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = head // HQ
    h = head % HQ
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    v_at = (HQ + HKV + h // (HQ // HKV)) * SIZE

    row_max = tl.full([BLOCK], -1e30, dtype=tl.float32)
    max_f = tl.full([BLOCK], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    total_f = tl.zeros([BLOCK], dtype=tl.float32)
    moved = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        R, dR, _, _, _, _ = scores(
            x_ptr, dx_ptr, None, mean_ptr, dmean_ptr, None, None, None, None,
            n, h, first, start, tokens, size, scale, True, False, False, False, False,
            HQ, HKV, SIZE, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        R_f = tl.where(ok, R + dR, float("-inf"))
        R = tl.where(ok, R, float("-inf"))
        row_max, total, factor, p = online_softmax(R, row_max, total)
        moved = moved * factor + tl.sum(p * dR, 1)
        max_f, total_f, _, _ = online_softmax(R_f, max_f, total_f)
    inverse = reciprocal(total)
    inv_f = reciprocal(total_f)
    mu = moved * inverse

    mean_e = tl.zeros([BLOCK], dtype=tl.float32)
    reach = tl.full([BLOCK], -1e30, dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        R, dR, _, _, _, _ = scores(
            x_ptr, dx_ptr, None, mean_ptr, dmean_ptr, None, None, None, None,
            n, h, first, start, tokens, size, scale, True, False, False, False, False,
            HQ, HKV, SIZE, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        P = probabilities(R, ok, row_max[:, None], inverse[:, None])
        mean_e += tl.sum(P * expm1(tl.minimum(dR - mu[:, None], LARGE)), 1)
        reach = tl.maximum(reach, tl.max(tl.where(ok, dR - mu[:, None], -1e30), 1))
    me = tl.where(reach < LARGE, mean_e, PLAIN)

    y = tl.zeros([BLOCK, D], dtype=tl.float32)
    dy = tl.zeros([BLOCK, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        R, dR, _, _, _, _ = scores(
            x_ptr, dx_ptr, None, mean_ptr, dmean_ptr, None, None, None, None,
            n, h, first, start, tokens, size, scale, True, False, False, False, False,
            HQ, HKV, SIZE, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        P = probabilities(R, ok, row_max[:, None], inverse[:, None])
        dP = probability_difference(
            R, dR, P, ok, mu[:, None], me[:, None], max_f[:, None], inv_f[:, None]
        )
        v = centred(x_ptr, mean_ptr, base, n * packed, v_at, start, tokens, packed, SIZE, BLOCK, D)
        dv = centred(
            dx_ptr, dmean_ptr, base, n * packed, v_at, start, tokens, packed, SIZE, BLOCK, D
        )
        y += tl.dot(P, v, input_precision=PRECISION)
        dy += tl.dot(dP, v, input_precision=PRECISION)
        dy += tl.dot(P + dP, dv, input_precision=PRECISION)
    y += mean_of(mean_ptr, n * packed + v_at, SIZE, D)
    dy += mean_of(dmean_ptr, n * packed + v_at, SIZE, D)
    out = n * tokens * HQ * SIZE + h * SIZE
    store_tile(y_ptr, out, first, tokens, HQ * SIZE, SIZE, y, BLOCK, D)
    store_tile(dy_ptr, out, first, tokens, HQ * SIZE, SIZE, dy, BLOCK, D)
    store_statistic(stats_ptr, MAX, n_heads, head, first, tokens, row_max, BLOCK)
    store_statistic(stats_ptr, INV, n_heads, head, first, tokens, inverse, BLOCK)
    store_statistic(stats_ptr, MAX_F, n_heads, head, first, tokens, max_f, BLOCK)
    store_statistic(stats_ptr, INV_F, n_heads, head, first, tokens, inv_f, BLOCK)
    store_statistic(stats_ptr, MU, n_heads, head, first, tokens, mu, BLOCK)
    store_statistic(stats_ptr, ME, n_heads, head, first, tokens, me, BLOCK)


@triton.jit
def first_order(
    x_ptr, dx_ptr, mean_ptr, dmean_ptr, g_ptr, stats_ptr, n_heads, head,
    n, h, q_first, k_first, tokens, size, scale,
    FINETUNED: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """P and A of the pretrained branch, or P_f and A_f of the fine-tuned one."""
    ok = seen(q_first, k_first, tokens, CAUSAL, WINDOW, BLOCK)
    if FINETUNED:
        # R + dR, term by term as the saved statistics saw them.
        R, dR, _, _, A, _ = scores(
            x_ptr, dx_ptr, None, mean_ptr, dmean_ptr, None, None, None, g_ptr,
            n, h, q_first, k_first, tokens, size, scale, True, False, False, True, False,
            HQ, HKV, SIZE, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        R += dR
        row_max = statistic(stats_ptr, MAX_F, n_heads, head, q_first, tokens, BLOCK)
        inverse = statistic(stats_ptr, INV_F, n_heads, head, q_first, tokens, BLOCK)
    else:
        R, _, _, A, _, _ = scores(
            x_ptr, None, None, mean_ptr, None, None, g_ptr, None, None,
            n, h, q_first, k_first, tokens, size, scale, False, False, True, False, False,
            HQ, HKV, SIZE, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        row_max = statistic(stats_ptr, MAX, n_heads, head, q_first, tokens, BLOCK)
        inverse = statistic(stats_ptr, INV, n_heads, head, q_first, tokens, BLOCK)
    return probabilities(R, ok, row_max, inverse), A


@triton.jit
def _attention_backward_rows_kernel(
    x_ptr, dx_ptr, mean_ptr, dmean_ptr, g_ptr, g_x_ptr, stats_ptr,
    n_heads, tokens, size, scale,
    FINETUNED: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """One rows program: g_q = gR k, gR = scale P (A - mean A); at x + dx if FINETUNED."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = head // HQ
    h = head % HQ
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    k_at = (HQ + h // (HQ // HKV)) * SIZE
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        P, A = first_order(
            x_ptr, dx_ptr, mean_ptr, dmean_ptr, g_ptr, stats_ptr, n_heads, head,
            n, h, first, start, tokens, size, scale,
            FINETUNED, HQ, HKV, SIZE, CAUSAL, WINDOW, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        mean += tl.sum(P * A, 1)
    which = MEAN_AF if FINETUNED else MEAN_A
    store_statistic(stats_ptr, which, n_heads, head, first, tokens, mean, BLOCK)

    g_q = tl.zeros([BLOCK, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        P, A = first_order(
            x_ptr, dx_ptr, mean_ptr, dmean_ptr, g_ptr, stats_ptr, n_heads, head,
            n, h, first, start, tokens, size, scale,
            FINETUNED, HQ, HKV, SIZE, CAUSAL, WINDOW, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        gR = P * (A - mean[:, None]) * scale
        k = centred(x_ptr, mean_ptr, base, n * packed, k_at, start, tokens, packed, SIZE, BLOCK, D)
        if FINETUNED:
            k += centred(
                dx_ptr, dmean_ptr, base, n * packed, k_at, start, tokens, packed, SIZE, BLOCK, D
            )
        g_q += tl.dot(gR, k, input_precision=PRECISION)
    store_tile(g_x_ptr, base + h * SIZE, first, tokens, packed, SIZE, g_q, BLOCK, D)


@triton.jit
def _attention_backward_columns_kernel(
    x_ptr, dx_ptr, mean_ptr, dmean_ptr, g_ptr, g_x_ptr, stats_ptr,
    n_heads, tokens, size, scale,
    FINETUNED: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """One columns program: g_k = gR^T q and g_v = P^T g; at x + dx if FINETUNED."""
    index = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = index // HKV
    kv = index % HKV
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    which = MEAN_AF if FINETUNED else MEAN_A
    g_k = tl.zeros([BLOCK, D], dtype=tl.float32)
    g_v = tl.zeros([BLOCK, D], dtype=tl.float32)
    for member in range(HQ // HKV):
        h = kv * (HQ // HKV) + member
        head = n * HQ + h
        out = n * tokens * HQ * SIZE + h * SIZE
        for start in range(0, tokens, BLOCK):
            P, A = first_order(
                x_ptr, dx_ptr, mean_ptr, dmean_ptr, g_ptr, stats_ptr, n_heads, head,
                n, h, start, first, tokens, size, scale,
                FINETUNED, HQ, HKV, SIZE, CAUSAL, WINDOW, PRECISION, BLOCK, CHUNK,
            )  # fmt: skip
            mean = statistic(stats_ptr, which, n_heads, head, start, tokens, BLOCK)
            gR = P * (A - mean) * scale
            q = tile(x_ptr, base + h * SIZE, start, tokens, packed, SIZE, BLOCK, D)
            if FINETUNED:
                q += tile(dx_ptr, base + h * SIZE, start, tokens, packed, SIZE, BLOCK, D)
            g_k += tl.dot(tl.trans(gR), q, input_precision=PRECISION)
            g = tile(g_ptr, out, start, tokens, HQ * SIZE, SIZE, BLOCK, D)
            g_v += tl.dot(tl.trans(P), g, input_precision=PRECISION)
    k_at = base + (HQ + kv) * SIZE
    store_tile(g_x_ptr, k_at, first, tokens, packed, SIZE, g_k, BLOCK, D)
    store_tile(g_x_ptr, k_at + HKV * SIZE, first, tokens, packed, SIZE, g_v, BLOCK, D)


@triton.jit
def _attention_tangent_kernel(
    x_ptr, t_ptr, mean_ptr, tmean_ptr, t_y_ptr, stats_ptr,
    n_heads, tokens, size, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """One rows program: t_y = tP v + P tv, tP = P (tR - mean tR); statistic MEAN_T."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = head // HQ
    h = head % HQ
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    v_at = (HQ + HKV + h // (HQ // HKV)) * SIZE
    row_max = statistic(stats_ptr, MAX, n_heads, head, first, tokens, BLOCK)
    inverse = statistic(stats_ptr, INV, n_heads, head, first, tokens, BLOCK)
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        R, _, tR, _, _, _ = scores(
            x_ptr, None, t_ptr, mean_ptr, None, tmean_ptr, None, None, None,
            n, h, first, start, tokens, size, scale, False, True, False, False, False,
            HQ, HKV, SIZE, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        mean += tl.sum(probabilities(R, ok, row_max, inverse) * tR, 1)
    store_statistic(stats_ptr, MEAN_T, n_heads, head, first, tokens, mean, BLOCK)

    t_y = tl.zeros([BLOCK, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        R, _, tR, _, _, _ = scores(
            x_ptr, None, t_ptr, mean_ptr, None, tmean_ptr, None, None, None,
            n, h, first, start, tokens, size, scale, False, True, False, False, False,
            HQ, HKV, SIZE, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        P = probabilities(R, ok, row_max, inverse)
        v = centred(x_ptr, mean_ptr, base, n * packed, v_at, start, tokens, packed, SIZE, BLOCK, D)
        tv = centred(
            t_ptr, tmean_ptr, base, n * packed, v_at, start, tokens, packed, SIZE, BLOCK, D
        )
        t_y += tl.dot(P * (tR - mean[:, None]), v, input_precision=PRECISION)
        t_y += tl.dot(P, tv, input_precision=PRECISION)
    t_y += mean_of(tmean_ptr, n * packed + v_at, SIZE, D)
    out = n * tokens * HQ * SIZE + h * SIZE
    store_tile(t_y_ptr, out, first, tokens, HQ * SIZE, SIZE, t_y, BLOCK, D)
