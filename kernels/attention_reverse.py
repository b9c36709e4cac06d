"""Attention, reverse sweep, and the sides that belong to keys and values.

With A = g v^T and A_f = b v_f^T less their row means, D = dP A_f, and
Z = S v^T + b dv^T + g tv^T + tS A, the cotangents of the scores are

    in S_x:  W = P (Z - mean Z - sum D) + D          in b_x:  P_f A_f

and gR = P A that of the first backward. Rows programs write the parts of q, columns programs those
of k and v, which sum over the queries of every head that shares them.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    INV,
    INV_F,
    MAX,
    MAX_F,
    ME,
    MEAN_A,
    MEAN_AF,
    MEAN_T,
    MEAN_Z,
    MU,
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


@triton.jit
def query_side(
    x_ptr, dx_ptr, t_ptr, g_ptr, S_ptr, b_ptr, base, out, q_at, first, tokens,
    packed, out_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """q, dq, tq, g, S, b of a block of queries."""
    q = rows_of(x_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
    dq = rows_of(dx_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
    tq = rows_of(t_ptr, base + q_at, first, tokens, packed, SIZE, BLOCK, D)
    g = rows_of(g_ptr, out, first, tokens, out_stride, SIZE, BLOCK, D)
    S = rows_of(S_ptr, out, first, tokens, out_stride, SIZE, BLOCK, D)
    b = rows_of(b_ptr, out, first, tokens, out_stride, SIZE, BLOCK, D)
    return q, dq, tq, g, S, b


@triton.jit
def key_side(
    x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, base, mean_base, at, first, tokens,
    packed, SIZE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A block of keys (or of values), with difference and tangent, less their token means."""
    k = rows_of(x_ptr, base + at, first, tokens, packed, SIZE, BLOCK, D)
    dk = rows_of(dx_ptr, base + at, first, tokens, packed, SIZE, BLOCK, D)
    tk = rows_of(t_ptr, base + at, first, tokens, packed, SIZE, BLOCK, D)
    k -= mean_of(mean_ptr, mean_base + at, SIZE, D)
    dk -= mean_of(dmean_ptr, mean_base + at, SIZE, D)
    tk -= mean_of(tmean_ptr, mean_base + at, SIZE, D)
    return k, dk, tk


@triton.jit
def weights(
    q, dq, k, dk, ok, scale, stats_ptr, n_heads, head, first, tokens,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P and dP of a block of queries and keys."""
    row_max = statistic(stats_ptr, MAX, n_heads, head, first, tokens, BLOCK)
    inverse = statistic(stats_ptr, INV, n_heads, head, first, tokens, BLOCK)
    max_f = statistic(stats_ptr, MAX_F, n_heads, head, first, tokens, BLOCK)
    inv_f = statistic(stats_ptr, INV_F, n_heads, head, first, tokens, BLOCK)
    mu = statistic(stats_ptr, MU, n_heads, head, first, tokens, BLOCK)
    me = statistic(stats_ptr, ME, n_heads, head, first, tokens, BLOCK)
    R = outer(q, k, PRECISION) * scale
    dR = (outer(dq, k, PRECISION) + outer(q + dq, dk, PRECISION)) * scale
    P = probabilities(R, ok, row_max, inverse)
    return P, probability_difference(R, dR, P, ok, mu, me, max_f, inv_f)


@triton.jit
def _attention_reverse_rows_kernel(
    x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr,
    S_x_ptr, b_x_ptr, stats_ptr,
    n_heads, tokens, scale,
    NEED_B: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK queries of one head; their columns of S_x, b_x; MEAN_AF and MEAN_Z."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = head // HQ
    packed = (HQ + 2 * HKV) * SIZE
    q_at, k_at, v_at = columns_of(n, head % HQ, HQ, HKV, SIZE)
    base = n * tokens * packed
    q, dq, tq, g, S, b = query_side(
        x_ptr, dx_ptr, t_ptr, g_ptr, S_ptr, b_ptr, base, n * tokens * HQ * SIZE + q_at, q_at,
        first, tokens, packed, HQ * SIZE, SIZE, BLOCK, D,
    )  # fmt: skip
    mean_A = statistic(stats_ptr, MEAN_A, n_heads, head, first, tokens, BLOCK)
    mean_T = statistic(stats_ptr, MEAN_T, n_heads, head, first, tokens, BLOCK)

    sum_fA = tl.zeros([BLOCK], dtype=tl.float32)
    sum_dA = tl.zeros([BLOCK], dtype=tl.float32)
    sum_d = tl.zeros([BLOCK], dtype=tl.float32)
    sum_Z = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        k, dk, tk = key_side(
            x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, base, n * packed, k_at,
            start, tokens, packed, SIZE, BLOCK, D,
        )  # fmt: skip
        v, dv, tv = key_side(
            x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, base, n * packed, v_at,
            start, tokens, packed, SIZE, BLOCK, D,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        P, dP = weights(
            q, dq, k, dk, ok, scale, stats_ptr, n_heads, head, first, tokens, PRECISION, BLOCK
        )
        A_f = outer(b, v + dv, PRECISION)
        sum_fA += tl.sum((P + dP) * A_f, 1)
        sum_dA += tl.sum(dP * A_f, 1)
        sum_d += tl.sum(dP, 1)
        tS = (outer(tq, k, PRECISION) + outer(q, tk, PRECISION)) * scale - mean_T
        Z = tS * (outer(g, v, PRECISION) - mean_A)
        Z += outer(S, v, PRECISION) + outer(b, dv, PRECISION) + outer(g, tv, PRECISION)
        sum_Z += tl.sum(P * Z, 1)
    mean_Z = sum_Z + (sum_dA - sum_fA * sum_d)
    store_statistic(stats_ptr, MEAN_AF, n_heads, head, first, tokens, sum_fA, BLOCK)
    store_statistic(stats_ptr, MEAN_Z, n_heads, head, first, tokens, mean_Z, BLOCK)

    S_q = tl.zeros([BLOCK, D], dtype=tl.float32)
    b_q = tl.zeros([BLOCK, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        k, dk, tk = key_side(
            x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, base, n * packed, k_at,
            start, tokens, packed, SIZE, BLOCK, D,
        )  # fmt: skip
        v, dv, tv = key_side(
            x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, base, n * packed, v_at,
            start, tokens, packed, SIZE, BLOCK, D,
        )  # fmt: skip
        ok = seen(first, start, tokens, CAUSAL, WINDOW, BLOCK)
        P, dP = weights(
            q, dq, k, dk, ok, scale, stats_ptr, n_heads, head, first, tokens, PRECISION, BLOCK
        )
        A_f = outer(b, v + dv, PRECISION) - sum_fA[:, None]
        A = outer(g, v, PRECISION) - mean_A
        tS = (outer(tq, k, PRECISION) + outer(q, tk, PRECISION)) * scale - mean_T
        Z = outer(S, v, PRECISION) + outer(b, dv, PRECISION) + outer(g, tv, PRECISION) + tS * A
        W = (P * (Z - mean_Z[:, None]) + dP * A_f) * scale
        bR = (P + dP) * A_f * scale
        S_q += tl.dot(W, k, input_precision=PRECISION)
        S_q += tl.dot(bR, dk, input_precision=PRECISION)
        S_q += tl.dot(P * A * scale, tk, input_precision=PRECISION)
        if NEED_B:
            b_q += tl.dot(bR, k + dk, input_precision=PRECISION)
    store_rows(S_x_ptr, base + q_at, first, tokens, packed, S_q, SIZE, BLOCK, D)
    if NEED_B:
        store_rows(b_x_ptr, base + q_at, first, tokens, packed, b_q, SIZE, BLOCK, D)


@triton.jit
def _attention_reverse_columns_kernel(
    x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr,
    S_x_ptr, b_x_ptr, stats_ptr,
    n_heads, tokens, scale,
    NEED_B: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK keys and values of one key head; their columns of S_x, b_x."""
    index = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = index // HKV
    group = HQ // HKV
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    _, k_at, v_at = columns_of(n, index % HKV * group, HQ, HKV, SIZE)
    k, dk, tk = key_side(
        x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, base, n * packed, k_at,
        first, tokens, packed, SIZE, BLOCK, D,
    )  # fmt: skip
    v, dv, tv = key_side(
        x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, base, n * packed, v_at,
        first, tokens, packed, SIZE, BLOCK, D,
    )  # fmt: skip
    S_k = tl.zeros([BLOCK, D], dtype=tl.float32)
    S_v = tl.zeros([BLOCK, D], dtype=tl.float32)
    b_k = tl.zeros([BLOCK, D], dtype=tl.float32)
    b_v = tl.zeros([BLOCK, D], dtype=tl.float32)
    for member in range(group):
        h = index % HKV * group + member
        head = n * HQ + h
        for start in range(0, tokens, BLOCK):
            q, dq, tq, g, S, b = query_side(
                x_ptr, dx_ptr, t_ptr, g_ptr, S_ptr, b_ptr, base,
                n * tokens * HQ * SIZE + h * SIZE, h * SIZE,
                start, tokens, packed, HQ * SIZE, SIZE, BLOCK, D,
            )  # fmt: skip
            ok = seen(start, first, tokens, CAUSAL, WINDOW, BLOCK)
            P, dP = weights(
                q, dq, k, dk, ok, scale, stats_ptr, n_heads, head, start, tokens, PRECISION, BLOCK
            )
            mean_A = statistic(stats_ptr, MEAN_A, n_heads, head, start, tokens, BLOCK)
            mean_T = statistic(stats_ptr, MEAN_T, n_heads, head, start, tokens, BLOCK)
            mean_Af = statistic(stats_ptr, MEAN_AF, n_heads, head, start, tokens, BLOCK)
            mean_Z = statistic(stats_ptr, MEAN_Z, n_heads, head, start, tokens, BLOCK)
            A_f = outer(b, v + dv, PRECISION) - mean_Af
            A = outer(g, v, PRECISION) - mean_A
            tS = (outer(tq, k, PRECISION) + outer(q, tk, PRECISION)) * scale - mean_T
            Z = outer(S, v, PRECISION) + outer(b, dv, PRECISION) + outer(g, tv, PRECISION) + tS * A
            W = (P * (Z - mean_Z) + dP * A_f) * scale
            bR = (P + dP) * A_f * scale
            S_k += tl.dot(tl.trans(W), q, input_precision=PRECISION)
            S_k += tl.dot(tl.trans(bR), dq, input_precision=PRECISION)
            S_k += tl.dot(tl.trans(P * A * scale), tq, input_precision=PRECISION)
            S_v += tl.dot(tl.trans(P), S, input_precision=PRECISION)
            S_v += tl.dot(tl.trans(dP), b, input_precision=PRECISION)
            S_v += tl.dot(tl.trans(P * tS), g, input_precision=PRECISION)
            if NEED_B:
                b_k += tl.dot(tl.trans(bR), q + dq, input_precision=PRECISION)
                b_v += tl.dot(tl.trans(P + dP), b, input_precision=PRECISION)
    store_rows(S_x_ptr, base + k_at, first, tokens, packed, S_k, SIZE, BLOCK, D)
    store_rows(S_x_ptr, base + v_at, first, tokens, packed, S_v, SIZE, BLOCK, D)
    if NEED_B:
        store_rows(b_x_ptr, base + k_at, first, tokens, packed, b_k, SIZE, BLOCK, D)
        store_rows(b_x_ptr, base + v_at, first, tokens, packed, b_v, SIZE, BLOCK, D)


@triton.jit
def _attention_backward_columns_kernel(
    x_ptr, dx_ptr, mean_ptr, dmean_ptr, g_ptr, g_x_ptr, stats_ptr,
    n_heads, tokens, scale,
    FINETUNED: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK keys and values of one key head; g_k = gR^T q and g_v = P^T g."""
    index = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = index // HKV
    group = HQ // HKV
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    _, k_at, v_at = columns_of(n, index % HKV * group, HQ, HKV, SIZE)
    k, dk, v = keys_and_values(
        x_ptr, dx_ptr, mean_ptr, dmean_ptr, base, n * packed, k_at, v_at, first, tokens,
        packed, FINETUNED, SIZE, BLOCK, D,
    )  # fmt: skip
    which_max = MAX
    which_inv = INV
    which_mean = MEAN_A
    if FINETUNED:
        which_max = MAX_F
        which_inv = INV_F
        which_mean = MEAN_AF
    g_k = tl.zeros([BLOCK, D], dtype=tl.float32)
    g_v = tl.zeros([BLOCK, D], dtype=tl.float32)
    for member in range(group):
        h = index % HKV * group + member
        head = n * HQ + h
        out = n * tokens * HQ * SIZE + h * SIZE
        for start in range(0, tokens, BLOCK):
            q = rows_of(x_ptr, base + h * SIZE, start, tokens, packed, SIZE, BLOCK, D)
            dq = q
            if FINETUNED:
                dq = rows_of(dx_ptr, base + h * SIZE, start, tokens, packed, SIZE, BLOCK, D)
            g = rows_of(g_ptr, out, start, tokens, HQ * SIZE, SIZE, BLOCK, D)
            row_max = statistic(stats_ptr, which_max, n_heads, head, start, tokens, BLOCK)
            inverse = statistic(stats_ptr, which_inv, n_heads, head, start, tokens, BLOCK)
            mean = statistic(stats_ptr, which_mean, n_heads, head, start, tokens, BLOCK)
            ok = seen(start, first, tokens, CAUSAL, WINDOW, BLOCK)
            S = scores(q, dq, k, dk, scale, FINETUNED, PRECISION)
            P = probabilities(S, ok, row_max, inverse)
            gR = P * (outer(g, v, PRECISION) - mean) * scale
            if FINETUNED:
                q += dq
            g_k += tl.dot(tl.trans(gR), q, input_precision=PRECISION)
            g_v += tl.dot(tl.trans(P), g, input_precision=PRECISION)
    store_rows(g_x_ptr, base + k_at, first, tokens, packed, g_k, SIZE, BLOCK, D)
    store_rows(g_x_ptr, base + v_at, first, tokens, packed, g_v, SIZE, BLOCK, D)
