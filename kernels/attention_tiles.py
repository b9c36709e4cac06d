"""Device functions of attention: tiles of packed rows, masks, score matrices.

A packed row is [q heads | k heads | v heads]. Keys and values are taken less their mean over the
tokens of the sequence: rows of P sum to one and rows of its derivatives to zero, so the mean drops
out of everything but y = P v, and low-precision products keep their digits for the rest.

Score matrices are formed CHUNK columns of the heads at a time. Whole heads would hold up to twelve
operands of the matrix units in registers at once, and spill; so would an unrolled loop over the
chunks, which is why the size of a head arrives as a number too, besides the constant SIZE.
"""

import triton
import triton.language as tl

from .scalar import expm1

# Score differences above which exp is no longer safe; the plain difference is accurate there.
LARGE = tl.constexpr(20.0)
# Value of the saved mean of expm1 that marks a row with such a difference (a mean is above -1).
PLAIN = tl.constexpr(-2.0)

# Row statistics, planes of [N * query heads, T] float32.
MAX = tl.constexpr(0)  # largest score, and one over the sum of exponentials
INV = tl.constexpr(1)
MAX_F = tl.constexpr(2)  # the same of the fine-tuned branch
INV_F = tl.constexpr(3)
MU = tl.constexpr(4)  # mean of dR under P
ME = tl.constexpr(5)  # mean of expm1(dR - mu) under P, or PLAIN
MEAN_A = tl.constexpr(6)  # mean of g v^T under P
MEAN_T = tl.constexpr(7)  # mean of tR under P
MEAN_AF = tl.constexpr(8)  # mean of b v_f^T under P_f
MEAN_Z = tl.constexpr(9)  # mean of Z under P, plus the sum of D
N_STATISTICS = 10


@triton.jit
def tile(ptr, at, first, tokens, stride, left, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Tokens first .. first + BLOCK, columns at .. at + COLUMNS; zero beyond T and ``left``."""
    r = first + tl.arange(0, BLOCK)
    c = tl.arange(0, COLUMNS)
    mask = (r[:, None] < tokens) & (c[None, :] < left)
    # Offsets inside a sequence fit in 32 bits, which halves the registers that hold them.
    where = ptr + at + (r[:, None] * stride + c[None, :])
    return tl.load(where, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def mean_of(mean_ptr, at, left, COLUMNS: tl.constexpr):
    """Token mean [1, COLUMNS] of those columns."""
    c = tl.arange(0, COLUMNS)
    return tl.load(mean_ptr + at + c, mask=c < left, other=0.0)[None, :]


@triton.jit
def centred(
    ptr, mean_ptr, base, mean_base, at, first, tokens, stride, left,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of keys or values less their token mean."""
    value = tile(ptr, base + at, first, tokens, stride, left, BLOCK, COLUMNS)
    return value - mean_of(mean_ptr, mean_base + at, left, COLUMNS)


@triton.jit
def store_tile(
    ptr, at, first, tokens, stride, left, value, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write a tile where ``tile`` would read it."""
    r = first + tl.arange(0, BLOCK)
    c = tl.arange(0, COLUMNS)
    mask = (r[:, None] < tokens) & (c[None, :] < left)
    tl.store(ptr + at + (r[:, None] * stride + c[None, :]), value, mask=mask)


@triton.jit
def seen(
    q_first, k_first, tokens,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK], whether query i may look at key j; False outside the sequence."""
    i = (q_first + tl.arange(0, BLOCK))[:, None]
    j = (k_first + tl.arange(0, BLOCK))[None, :]
    ok = (i < tokens) & (j < tokens)
    if CAUSAL:
        ok = ok & (j <= i)
        if WINDOW > 0:
            ok = ok & (i - j < WINDOW)
    return ok


@triton.jit
def outer(a, b, PRECISION: tl.constexpr):
    """a b^T."""
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def scores(
    x_ptr, dx_ptr, t_ptr, mean_ptr, dmean_ptr, tmean_ptr, g_ptr, S_ptr, b_ptr,
    n, h, q_first, k_first, tokens, size, scale,
    HAS_DX: tl.constexpr, HAS_T: tl.constexpr, HAS_G: tl.constexpr, HAS_B: tl.constexpr,
    HAS_S: tl.constexpr,
    HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Score matrices of one block of queries and one of keys, zero where their inputs are absent.

    R = scale q k^T                          dR = scale (dq k^T + (q + dq) dk^T)   HAS_DX
    tR = scale (tq k^T + q tk^T)   HAS_T     A = g v^T                             HAS_G
    A_f = b (v + dv)^T             HAS_B     Z = S v^T + b dv^T + g tv^T           HAS_S
    """
    kv = h // (HQ // HKV)
    packed = (HQ + 2 * HKV) * SIZE
    base = n * tokens * packed
    out = n * tokens * HQ * SIZE
    R = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    dR = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    tR = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    A = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    A_f = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    Z = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for c in range(0, size, CHUNK):
        left = size - c
        q_at = h * SIZE + c
        k_at = (HQ + kv) * SIZE + c
        q = tile(x_ptr, base + q_at, q_first, tokens, packed, left, BLOCK, CHUNK)
        k = centred(
            x_ptr, mean_ptr, base, n * packed, k_at, k_first, tokens, packed, left, BLOCK, CHUNK
        )
        R += outer(q, k, PRECISION)
        if HAS_T:
            tq = tile(t_ptr, base + q_at, q_first, tokens, packed, left, BLOCK, CHUNK)
            tk = centred(
                t_ptr, tmean_ptr, base, n * packed, k_at, k_first, tokens, packed, left,
                BLOCK, CHUNK,
            )  # fmt: skip
            tR += outer(tq, k, PRECISION)
            tR += outer(q, tk, PRECISION)
        if HAS_DX:
            dq = tile(dx_ptr, base + q_at, q_first, tokens, packed, left, BLOCK, CHUNK)
            dk = centred(
                dx_ptr, dmean_ptr, base, n * packed, k_at, k_first, tokens, packed, left,
                BLOCK, CHUNK,
            )  # fmt: skip
            dR += outer(dq, k, PRECISION)
            dR += outer(q + dq, dk, PRECISION)
    # A loop of their own: the addresses and operands of both sides together would spill.
    if HAS_G or HAS_B:
        for c in range(0, size, CHUNK):
            left = size - c
            q_at = h * SIZE + c
            v_at = (HQ + HKV + kv) * SIZE + c
            v = centred(
                x_ptr, mean_ptr, base, n * packed, v_at, k_first, tokens, packed, left, BLOCK, CHUNK
            )
            if HAS_S:
                S = tile(S_ptr, out + q_at, q_first, tokens, HQ * SIZE, left, BLOCK, CHUNK)
                Z += outer(S, v, PRECISION)
            if HAS_G:
                g = tile(g_ptr, out + q_at, q_first, tokens, HQ * SIZE, left, BLOCK, CHUNK)
                A += outer(g, v, PRECISION)
                if HAS_S:
                    tv = centred(
                        t_ptr, tmean_ptr, base, n * packed, v_at, k_first, tokens, packed, left,
                        BLOCK, CHUNK,
                    )  # fmt: skip
                    Z += outer(g, tv, PRECISION)
            if HAS_B:
                b = tile(b_ptr, out + q_at, q_first, tokens, HQ * SIZE, left, BLOCK, CHUNK)
                dv = centred(
                    dx_ptr, dmean_ptr, base, n * packed, v_at, k_first, tokens, packed, left,
                    BLOCK, CHUNK,
                )  # fmt: skip
                A_f += outer(b, v + dv, PRECISION)
                if HAS_S:
                    Z += outer(b, dv, PRECISION)
    return R * scale, dR * scale, tR * scale, A, A_f, Z


@triton.jit
def statistic(stats_ptr, which, n_heads, head, first, tokens, BLOCK: tl.constexpr):
    """Row statistic ``which`` of BLOCK queries, as a column [BLOCK, 1]."""
    r = first + tl.arange(0, BLOCK)
    at = stats_ptr + (which * n_heads + head) * tokens + r
    return tl.load(at, mask=r < tokens, other=0.0)[:, None]


@triton.jit
def store_statistic(stats_ptr, which, n_heads, head, first, tokens, value, BLOCK: tl.constexpr):
    """Write a row statistic [BLOCK]."""
    r = first + tl.arange(0, BLOCK)
    tl.store(stats_ptr + (which * n_heads + head) * tokens + r, value, mask=r < tokens)


@triton.jit
def probabilities(R, ok, row_max, inverse):
    """P from scores and the saved statistics of its rows; zero where a query may not look."""
    return tl.exp(tl.where(ok, R - row_max, -1e30)) * inverse


@triton.jit
def probability_difference(R, dR, P, ok, mu, me, max_f, inv_f):
    """softmax(R + dR) - softmax(R) without cancellation: P (e - m) / (1 + m)."""
    e = expm1(tl.minimum(dR - mu, LARGE))
    plain = me < -1.0
    small = P * (e - me) / tl.where(plain, 1.0, 1.0 + me)
    return tl.where(plain, probabilities(R + dR, ok, max_f, inv_f) - P, small)
