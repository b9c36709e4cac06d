"""Attention, the sides that belong to queries: outputs, cotangents of q, row statistics.

One program: BLOCK queries of one head of one sequence, all keys in blocks. Each sweep leaves the
row statistics that the later ones need (attention_tiles), so none but the first repeats a softmax.
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
    columns_of,
    keys_and_values,
    mean_of,
    outer,
    probabilities,
    probability_difference,
    rows_of,
    scores,
    seen,
    statistic,
    store_rows,
    store_statistic,
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
    n_heads, tokens, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """y = P v and dy = dP v + P_f dv; statistics MAX to ME. x, dx [N, T, packed]."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = head // HQ
    packed = (HQ + 2 * HKV) * SIZE
    q_at, k_at, v_at = columns_of(n, head % HQ, HQ, HKV, SIZE)
    base = n * tokens * packed
    q = rows_of(x_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
    dq = rows_of(dx_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
    k_mean = mean_of(mean_ptr, n * packed + k_at, SIZE, D)
    dk_mean = mean_of(dmean_ptr, n * packed + k_at, SIZE, D)

    row_max = tl.full([BLOCK], -1e30, dtype=tl.float32)
    max_f = tl.full([BLOCK], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    total_f = tl.zeros([BLOCK], dtype=tl.float32)
    moved = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        k = rows_of(x_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - k_mean
        dk = rows_of(dx_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - dk_mean
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        S = outer(q, k, PRECISION) * scale
        dS = (outer(dq, k, PRECISION) + outer(q + dq, dk, PRECISION)) * scale
        S_f = tl.where(ok, S + dS, float("-inf"))
        S = tl.where(ok, S, float("-inf"))
        row_max, total, factor, p = online_softmax(S, row_max, total)
        moved = moved * factor + tl.sum(p * dS, 1)
        max_f, total_f, _, _ = online_softmax(S_f, max_f, total_f)
    inverse = reciprocal(total)
    mu = moved * inverse

    mean_e = tl.zeros([BLOCK], dtype=tl.float32)
    reach = tl.full([BLOCK], -1e30, dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        k = rows_of(x_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - k_mean
        dk = rows_of(dx_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - dk_mean
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        S = outer(q, k, PRECISION) * scale
        dS = (outer(dq, k, PRECISION) + outer(q + dq, dk, PRECISION)) * scale - mu[:, None]
        P = probabilities(S, ok, row_max[:, None], inverse[:, None])
        mean_e += tl.sum(P * expm1(tl.minimum(dS, LARGE)), 1)
        reach = tl.maximum(reach, tl.max(tl.where(ok, dS, -1e30), 1))
    me = tl.where(reach < LARGE, mean_e, PLAIN)
    inv_f = reciprocal(total_f)

    y = tl.zeros([BLOCK, D], dtype=tl.float32)
    dy = tl.zeros([BLOCK, D], dtype=tl.float32)
    v_mean = mean_of(mean_ptr, n * packed + v_at, SIZE, D)
    dv_mean = mean_of(dmean_ptr, n * packed + v_at, SIZE, D)
    for start in range(0, tokens, BLOCK):
        k = rows_of(x_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - k_mean
        dk = rows_of(dx_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - dk_mean
        v = rows_of(x_ptr, base + v_at, start, tokens, packed, SIZE, BLOCK, D) - v_mean
        dv = rows_of(dx_ptr, base + v_at, start, tokens, packed, SIZE, BLOCK, D) - dv_mean
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        S = outer(q, k, PRECISION) * scale
        dS = (outer(dq, k, PRECISION) + outer(q + dq, dk, PRECISION)) * scale
        P = probabilities(S, ok, row_max[:, None], inverse[:, None])
        dP = probability_difference(
            S, dS, P, ok, mu[:, None], me[:, None], max_f[:, None], inv_f[:, None]
        )
        y += tl.dot(P, v, input_precision=PRECISION)
        dy += tl.dot(dP, v, input_precision=PRECISION)
        dy += tl.dot(P + dP, dv, input_precision=PRECISION)
    out = n * tokens * HQ * SIZE + q_at
    store_rows(y_ptr, out, first, tokens, HQ * SIZE, y + v_mean, SIZE, BLOCK, D)
    store_rows(dy_ptr, out, first, tokens, HQ * SIZE, dy + dv_mean, SIZE, BLOCK, D)
    store_statistic(stats_ptr, MAX, n_heads, head, first, tokens, row_max, BLOCK)
    store_statistic(stats_ptr, INV, n_heads, head, first, tokens, inverse, BLOCK)
    store_statistic(stats_ptr, MAX_F, n_heads, head, first, tokens, max_f, BLOCK)
    store_statistic(stats_ptr, INV_F, n_heads, head, first, tokens, inv_f, BLOCK)
    store_statistic(stats_ptr, MU, n_heads, head, first, tokens, mu, BLOCK)
    store_statistic(stats_ptr, ME, n_heads, head, first, tokens, me, BLOCK)


@triton.jit
def _attention_backward_rows_kernel(
    x_ptr, dx_ptr, mean_ptr, dmean_ptr, g_ptr, g_x_ptr, stats_ptr,
    n_heads, tokens, scale,
    FINETUNED: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Cotangent of q = scale P (A - mean A) k, A = g v^T, at x or (FINETUNED) at x + dx."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = head // HQ
    packed = (HQ + 2 * HKV) * SIZE
    q_at, k_at, v_at = columns_of(n, head % HQ, HQ, HKV, SIZE)
    base = n * tokens * packed
    out = n * tokens * HQ * SIZE + q_at
    q = rows_of(x_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
    dq = q
    g = rows_of(g_ptr, out, first, tokens, HQ * SIZE, SIZE, BLOCK, D)
    which_max = MAX
    which_inv = INV
    which_mean = MEAN_A
    if FINETUNED:
        dq = rows_of(dx_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
        which_max = MAX_F
        which_inv = INV_F
        which_mean = MEAN_AF
    row_max = statistic(stats_ptr, which_max, n_heads, head, first, tokens, BLOCK)
    inverse = statistic(stats_ptr, which_inv, n_heads, head, first, tokens, BLOCK)

    mean = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        k, dk, v = keys_and_values(
            x_ptr, dx_ptr, mean_ptr, dmean_ptr, base, n * packed, k_at, v_at, start, tokens,
            packed, FINETUNED, SIZE, BLOCK, D,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        S = scores(q, dq, k, dk, scale, FINETUNED, PRECISION)
        P = probabilities(S, ok, row_max, inverse)
        mean += tl.sum(P * outer(g, v, PRECISION), 1)
    store_statistic(stats_ptr, which_mean, n_heads, head, first, tokens, mean, BLOCK)

    g_q = tl.zeros([BLOCK, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        k, dk, v = keys_and_values(
            x_ptr, dx_ptr, mean_ptr, dmean_ptr, base, n * packed, k_at, v_at, start, tokens,
            packed, FINETUNED, SIZE, BLOCK, D,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        S = scores(q, dq, k, dk, scale, FINETUNED, PRECISION)
        P = probabilities(S, ok, row_max, inverse)
        gR = P * (outer(g, v, PRECISION) - mean[:, None]) * scale
        if FINETUNED:
            k += dk
        g_q += tl.dot(gR, k, input_precision=PRECISION)
    store_rows(g_x_ptr, base + q_at, first, tokens, packed, g_q, SIZE, BLOCK, D)


@triton.jit
def _attention_tangent_kernel(
    x_ptr, t_ptr, mean_ptr, tmean_ptr, t_y_ptr, stats_ptr,
    n_heads, tokens, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """t_y = tP v + P tv, tP = P (tS - mean tS), tS = scale (tq k^T + q tk^T)."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = head // HQ
    packed = (HQ + 2 * HKV) * SIZE
    q_at, k_at, v_at = columns_of(n, head % HQ, HQ, HKV, SIZE)
    base = n * tokens * packed
    q = rows_of(x_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
    tq = rows_of(t_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
    k_mean = mean_of(mean_ptr, n * packed + k_at, SIZE, D)
    tk_mean = mean_of(tmean_ptr, n * packed + k_at, SIZE, D)
    v_mean = mean_of(mean_ptr, n * packed + v_at, SIZE, D)
    tv_mean = mean_of(tmean_ptr, n * packed + v_at, SIZE, D)
    row_max = statistic(stats_ptr, MAX, n_heads, head, first, tokens, BLOCK)
    inverse = statistic(stats_ptr, INV, n_heads, head, first, tokens, BLOCK)

    mean = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        k = rows_of(x_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - k_mean
        tk = rows_of(t_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - tk_mean
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        P = probabilities(outer(q, k, PRECISION) * scale, ok, row_max, inverse)
        tS = (outer(tq, k, PRECISION) + outer(q, tk, PRECISION)) * scale
        mean += tl.sum(P * tS, 1)
    store_statistic(stats_ptr, MEAN_T, n_heads, head, first, tokens, mean, BLOCK)

    t_y = tl.zeros([BLOCK, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        k = rows_of(x_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - k_mean
        tk = rows_of(t_ptr, base + k_at, start, tokens, packed, SIZE, BLOCK, D) - tk_mean
        v = rows_of(x_ptr, base + v_at, start, tokens, packed, SIZE, BLOCK, D) - v_mean
        tv = rows_of(t_ptr, base + v_at, start, tokens, packed, SIZE, BLOCK, D) - tv_mean
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        P = probabilities(outer(q, k, PRECISION) * scale, ok, row_max, inverse)
        tS = (outer(tq, k, PRECISION) + outer(q, tk, PRECISION)) * scale
        t_y += tl.dot(P * (tS - mean[:, None]), v, input_precision=PRECISION)
        t_y += tl.dot(P, tv, input_precision=PRECISION)
    out = n * tokens * HQ * SIZE + q_at
    store_rows(t_y_ptr, out, first, tokens, HQ * SIZE, t_y + tv_mean, SIZE, BLOCK, D)
