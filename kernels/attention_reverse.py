"""Attention kernels: the reverse sweep.

With A = g v^T and A_f = b v_f^T less their row means, D = dP A_f, and
Z = S v^T + b dv^T + g tv^T + tS A, the cotangents of the scores are

    in S_x:  W = P (Z - mean Z - sum D) + D          in b_x:  P_f A_f

and gR = P A that of the first backward. Rows and columns programs as in attention_sweeps.
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
    centred,
    probabilities,
    probability_difference,
    scores,
    seen,
    statistic,
    store_statistic,
    store_tile,
    tile,
)


@triton.jit
def second_order(
    x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr, stats_ptr,
    n_heads, head, n, h, q_first, k_first, tokens, size, scale,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """P, dP, tS and A less their row means, A_f as it is, and Z of one block."""
    R, dR, tS, A, A_f, Z = scores(
        x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr,
        n, h, q_first, k_first, tokens, size, scale, True, True, True, True, True,
        HQ, HKV, SIZE, PRECISION, BLOCK, CHUNK,
    )  # fmt: skip
    ok = seen(q_first, k_first, tokens, CAUSAL, WINDOW, BLOCK)
    row_max = statistic(stats_ptr, MAX, n_heads, head, q_first, tokens, BLOCK)
    inverse = statistic(stats_ptr, INV, n_heads, head, q_first, tokens, BLOCK)
    max_f = statistic(stats_ptr, MAX_F, n_heads, head, q_first, tokens, BLOCK)
    inv_f = statistic(stats_ptr, INV_F, n_heads, head, q_first, tokens, BLOCK)
    mu = statistic(stats_ptr, MU, n_heads, head, q_first, tokens, BLOCK)
    me = statistic(stats_ptr, ME, n_heads, head, q_first, tokens, BLOCK)
    P = probabilities(R, ok, row_max, inverse)
    dP = probability_difference(R, dR, P, ok, mu, me, max_f, inv_f)
    tS -= statistic(stats_ptr, MEAN_T, n_heads, head, q_first, tokens, BLOCK)
    A -= statistic(stats_ptr, MEAN_A, n_heads, head, q_first, tokens, BLOCK)
    return P, dP, tS, A, A_f, Z + tS * A


@triton.jit
def _attention_reverse_rows_kernel(
    x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr,
    S_x_ptr, b_x_ptr, stats_ptr,
    n_heads, tokens, size, scale,
    NEED_B: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """One rows program: the q columns of S_x and b_x; statistics MEAN_AF and MEAN_Z."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = head // HQ
    h = head % HQ
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    k_at = (HQ + h // (HQ // HKV)) * SIZE
    sum_fA = tl.zeros([BLOCK], dtype=tl.float32)
    sum_dA = tl.zeros([BLOCK], dtype=tl.float32)
    sum_d = tl.zeros([BLOCK], dtype=tl.float32)
    sum_Z = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        P, dP, _, _, A_f, Z = second_order(
            x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr, stats_ptr,
            n_heads, head, n, h, first, start, tokens, size, scale,
            HQ, HKV, SIZE, CAUSAL, WINDOW, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        sum_fA += tl.sum((P + dP) * A_f, 1)
        sum_dA += tl.sum(dP * A_f, 1)
        sum_d += tl.sum(dP, 1)
        sum_Z += tl.sum(P * Z, 1)
    # The sum of D = dP (A_f - mean A_f), whatever the rounded dP sums to.
    mean_Z = sum_Z + (sum_dA - sum_fA * sum_d)
    store_statistic(stats_ptr, MEAN_AF, n_heads, head, first, tokens, sum_fA, BLOCK)
    store_statistic(stats_ptr, MEAN_Z, n_heads, head, first, tokens, mean_Z, BLOCK)

    S_q = tl.zeros([BLOCK, D], dtype=tl.float32)
    b_q = tl.zeros([BLOCK, D], dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        P, dP, _, A, A_f, Z = second_order(
            x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr, stats_ptr,
            n_heads, head, n, h, first, start, tokens, size, scale,
            HQ, HKV, SIZE, CAUSAL, WINDOW, PRECISION, BLOCK, CHUNK,
        )  # fmt: skip
        A_f -= sum_fA[:, None]
        W = (P * (Z - mean_Z[:, None]) + dP * A_f) * scale
        bR = (P + dP) * A_f * scale
        gR = P * A * scale
        tk = centred(
            t_ptr, tmean_ptr, base, n * packed, k_at, start, tokens, packed, SIZE, BLOCK, D
        )
        S_q += tl.dot(gR, tk, input_precision=PRECISION)
        k = centred(x_ptr, mean_ptr, base, n * packed, k_at, start, tokens, packed, SIZE, BLOCK, D)
        S_q += tl.dot(W, k, input_precision=PRECISION)
        dk = centred(
            dx_ptr, dmean_ptr, base, n * packed, k_at, start, tokens, packed, SIZE, BLOCK, D
        )
        S_q += tl.dot(bR, dk, input_precision=PRECISION)
        if NEED_B:
            b_q += tl.dot(bR, k + dk, input_precision=PRECISION)
    store_tile(S_x_ptr, base + h * SIZE, first, tokens, packed, SIZE, S_q, BLOCK, D)
    if NEED_B:
        store_tile(b_x_ptr, base + h * SIZE, first, tokens, packed, SIZE, b_q, BLOCK, D)


@triton.jit
def _attention_reverse_columns_kernel(
    x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr,
    S_x_ptr, b_x_ptr, stats_ptr,
    n_heads, tokens, size, scale,
    NEED_B: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """One columns program: the k and v columns of S_x and b_x of one key head."""
    index = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    n = index // HKV
    kv = index % HKV
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    S_k = tl.zeros([BLOCK, D], dtype=tl.float32)
    S_v = tl.zeros([BLOCK, D], dtype=tl.float32)
    b_k = tl.zeros([BLOCK, D], dtype=tl.float32)
    b_v = tl.zeros([BLOCK, D], dtype=tl.float32)
    for member in range(HQ // HKV):
        h = kv * (HQ // HKV) + member
        head = n * HQ + h
        out = n * tokens * HQ * SIZE + h * SIZE
        for start in range(0, tokens, BLOCK):
            P, dP, tS, A, A_f, Z = second_order(
                x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr,
                stats_ptr, n_heads, head, n, h, start, first, tokens, size, scale,
                HQ, HKV, SIZE, CAUSAL, WINDOW, PRECISION, BLOCK, CHUNK,
            )  # fmt: skip
            A_f -= statistic(stats_ptr, MEAN_AF, n_heads, head, start, tokens, BLOCK)
            Z -= statistic(stats_ptr, MEAN_Z, n_heads, head, start, tokens, BLOCK)
            W = (P * Z + dP * A_f) * scale
            bR = (P + dP) * A_f * scale
            gR = P * A * scale
            g = tile(g_ptr, out, start, tokens, HQ * SIZE, SIZE, BLOCK, D)
            S_v += tl.dot(tl.trans(P * tS), g, input_precision=PRECISION)
            tq = tile(t_ptr, base + h * SIZE, start, tokens, packed, SIZE, BLOCK, D)
            S_k += tl.dot(tl.trans(gR), tq, input_precision=PRECISION)
            q = tile(x_ptr, base + h * SIZE, start, tokens, packed, SIZE, BLOCK, D)
            S_k += tl.dot(tl.trans(W), q, input_precision=PRECISION)
            dq = tile(dx_ptr, base + h * SIZE, start, tokens, packed, SIZE, BLOCK, D)
            S_k += tl.dot(tl.trans(bR), dq, input_precision=PRECISION)
            if NEED_B:
                b_k += tl.dot(tl.trans(bR), q + dq, input_precision=PRECISION)
            S = tile(S_ptr, out, start, tokens, HQ * SIZE, SIZE, BLOCK, D)
            S_v += tl.dot(tl.trans(P), S, input_precision=PRECISION)
            b = tile(b_ptr, out, start, tokens, HQ * SIZE, SIZE, BLOCK, D)
            S_v += tl.dot(tl.trans(dP), b, input_precision=PRECISION)
            if NEED_B:
                b_v += tl.dot(tl.trans(P + dP), b, input_precision=PRECISION)
    k_at = base + (HQ + kv) * SIZE
    store_tile(S_x_ptr, k_at, first, tokens, packed, SIZE, S_k, BLOCK, D)
    store_tile(S_x_ptr, k_at + HKV * SIZE, first, tokens, packed, SIZE, S_v, BLOCK, D)
    if NEED_B:
        store_tile(b_x_ptr, k_at, first, tokens, packed, SIZE, b_k, BLOCK, D)
        store_tile(b_x_ptr, k_at + HKV * SIZE, first, tokens, packed, SIZE, b_v, BLOCK, D)
