"""Device functions of attention: tiles of packed rows, masks, score matrices.

A packed row is [q heads | k heads | v heads]. A tile is [BLOCK tokens, D] of one head with D the
power of two that holds a head; columns beyond the head's size are zero. Keys and values are taken
less their mean over the tokens of the sequence: rows of P sum to one and rows of its derivatives
to zero, so the mean drops out of everything but y = P v, and low-precision products keep their
digits for the rest.
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
MU = tl.constexpr(4)  # mean of dS under P
ME = tl.constexpr(5)  # mean of expm1(dS - mu) under P, or PLAIN
MEAN_A = tl.constexpr(6)  # mean of g v^T under P
MEAN_T = tl.constexpr(7)  # mean of tS under P
MEAN_AF = tl.constexpr(8)  # mean of b v_f^T under P_f
MEAN_Z = tl.constexpr(9)  # mean of Z under P, plus the sum of D
N_STATISTICS = 10


@triton.jit
def rows_of(
    ptr, base, first, tokens, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):
    """Tile of tokens first .. first + BLOCK; zero outside the sequence and the head."""
    r = first + tl.arange(0, BLOCK)
    c = tl.arange(0, D)
    mask = (r[:, None] < tokens) & (c[None, :] < SIZE)
    at = ptr + base + r[:, None].to(tl.int64) * stride + c[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def mean_of(mean_ptr, at, SIZE: tl.constexpr, D: tl.constexpr):
    """Token mean [1, D] of one head."""
    c = tl.arange(0, D)
    return tl.load(mean_ptr + at + c, mask=c < SIZE, other=0.0)[None, :]


@triton.jit
def store_rows(
    ptr, base, first, tokens, stride, tile,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write a tile back to where ``rows_of`` would read it."""
    r = first + tl.arange(0, BLOCK)
    c = tl.arange(0, D)
    mask = (r[:, None] < tokens) & (c[None, :] < SIZE)
    tl.store(ptr + base + r[:, None].to(tl.int64) * stride + c[None, :], tile, mask=mask)


@triton.jit
def columns_of(n, h, HQ: tl.constexpr, HKV: tl.constexpr, SIZE: tl.constexpr):
    """Columns of query head h, and of its key and value head, in a packed row."""
    kv = h // (HQ // HKV)
    return h * SIZE, (HQ + kv) * SIZE, (HQ + HKV + kv) * SIZE


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
def scores(q, dq, k, dk, scale, FINETUNED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores; FINETUNED as pretrained ones plus difference, like the saved statistics saw them."""
    S = outer(q, k, PRECISION) * scale
    if FINETUNED:
        S += (outer(dq, k, PRECISION) + outer(q + dq, dk, PRECISION)) * scale
    return S


@triton.jit
def keys_and_values(
    x_ptr, dx_ptr, mean_ptr, dmean_ptr, base, mean_base, k_at, v_at, first, tokens, packed,
    FINETUNED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """k, dk and v of a block less their means; FINETUNED: v of the fine-tuned branch."""
    k = rows_of(x_ptr, base + k_at, first, tokens, packed, SIZE, BLOCK, D)
    v = rows_of(x_ptr, base + v_at, first, tokens, packed, SIZE, BLOCK, D)
    k -= mean_of(mean_ptr, mean_base + k_at, SIZE, D)
    v -= mean_of(mean_ptr, mean_base + v_at, SIZE, D)
    dk = k
    if FINETUNED:
        dk = rows_of(dx_ptr, base + k_at, first, tokens, packed, SIZE, BLOCK, D)
        dk -= mean_of(dmean_ptr, mean_base + k_at, SIZE, D)
        v += rows_of(dx_ptr, base + v_at, first, tokens, packed, SIZE, BLOCK, D)
        v -= mean_of(dmean_ptr, mean_base + v_at, SIZE, D)
    return k, dk, v


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
def probabilities(S, ok, row_max, inverse):
    """P from scores and the saved statistics of its rows; zero where a query may not look."""
    return tl.exp(tl.where(ok, S - row_max, -1e30)) * inverse


@triton.jit
def probability_difference(S, dS, P, ok, mu, me, max_f, inv_f):
    """softmax(S + dS) - softmax(S) without cancellation: P (e - m) / (1 + m)."""
    e = expm1(tl.minimum(dS - mu, LARGE))
    plain = me < -1.0
    small = P * (e - me) / tl.where(plain, 1.0, 1.0 + me)
    return tl.where(plain, probabilities(S + dS, ok, max_f, inv_f) - P, small)
