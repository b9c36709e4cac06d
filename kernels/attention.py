"""Softmax attention over packed heads, four sweeps and the adjoint, for sequences up to 512 tokens.

Nothing of size T x T is stored: each sweep forms its score matrices again, block by block, from
row statistics that the earlier sweeps left. One sequence of up to one block of tokens is a whole
head in one program. Layouts the kernels do not take (see ``supports``), and an evaluation without
a difference, go to the torch twin.
"""

import torch
import triton
import triton.language as tl

from fda_fast.ops import memory
from fda_fast.ops.reference import attention as twin

from . import launch
from .attention_reverse import _attention_reverse_columns_kernel, _attention_reverse_rows_kernel
from .attention_sweeps import (
    _attention_backward_columns_kernel,
    _attention_backward_rows_kernel,
    _attention_forward_kernel,
    _attention_tangent_kernel,
)
from .attention_tiles import N_STATISTICS

LONGEST = 512
WIDEST_HEAD = 128
# Columns of the heads taken at a time in products that form score matrices.
CHUNK = 16


@triton.jit
def _attention_rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    tokens, width, rotary,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BACK: tl.constexpr,
    BLOCK_HEAD: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program: the q and k heads (HEADS of them) of one token, rotated or rotated BACK.

    x, out [N * T, width]; cos, sin [T, rotary], halves paired as in rotate_half. Columns that are
    not rotated are not touched.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEAD + tl.arange(0, BLOCK_HEAD)[:, None]
    half = rotary // 2
    i = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < HEADS) & (i < half)
    low = row * width + head * SIZE + i
    table = row % tokens * rotary + i
    a = tl.load(x_ptr + low, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + low + half, mask=mask, other=0.0).to(tl.float32)
    cos_a = tl.load(cos_ptr + table, mask=i < half, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + table + half, mask=i < half, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + table, mask=i < half, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + table + half, mask=i < half, other=0.0).to(tl.float32)
    if BACK:
        tl.store(out_ptr + low, a * cos_a + b * sin_b, mask=mask)
        tl.store(out_ptr + low + half, b * cos_b - a * sin_a, mask=mask)
    else:
        tl.store(out_ptr + low, a * cos_a - b * sin_a, mask=mask)
        tl.store(out_ptr + low + half, b * cos_b + a * sin_b, mask=mask)


def supports(x, heads) -> bool:
    """Whether the kernels take this layout: no softcap, T <= 512, heads up to 128 wide."""
    return (
        heads.softcap is None
        and 0 < x.shape[1] <= LONGEST
        and x.shape[0] > 0
        and heads.size <= WIDEST_HEAD
    )


def forward(x, dx, heads, *, rope=None, precision=None):
    """See ``fda_fast.ops.attention.forward``."""
    if dx is None or not supports(x, heads):
        return twin.forward(x, dx, heads, rope=rope, precision=precision)
    sweeps = Sweeps(x, dx, heads, rope, precision)
    y, dy = sweeps.forward()
    return y, dy, sweeps


class Sweeps:
    """One evaluation: the packed inputs, their token means and the row statistics."""

    def __init__(self, x, dx, heads, rope, precision) -> None:
        self.heads, self.rope, self.dtype = heads, rope, x.dtype
        self.x, self.dx = self._rotated(x), self._rotated(dx)
        self.mean, self.dmean = self._means(self.x), self._means(self.dx)
        n, tokens, _ = x.shape
        shape = (N_STATISTICS, n * heads.query, tokens)
        self.stats = memory.empty(shape, x, torch.float32)
        # Tensor cores round operands to 10 bits at worst, which is below the rounding of bf16.
        exact = precision is None or getattr(precision, "name", "fp32") == "fp32"
        self.products = "ieee" if exact and x.dtype == torch.float32 else "tf32"

    def _means(self, x):
        return x.mean(1, dtype=torch.float32)

    def _rotate(self, x, out, back):
        n, tokens, width = x.shape
        cos, sin = self.rope
        heads = self.heads.query + self.heads.key_value
        block_head = min(16, triton.next_power_of_2(heads))
        half = triton.next_power_of_2(max(1, cos.shape[-1] // 2))
        with launch.on(x):
            _attention_rotate_kernel[(n * tokens, triton.cdiv(heads, block_head))](
                x, cos, sin, out, tokens, width, cos.shape[-1],
                HEADS=heads, SIZE=self.heads.size, BACK=back,
                BLOCK_HEAD=block_head, BLOCK_HALF=half, num_warps=4,
            )  # fmt: skip

    def _rotated(self, x):
        """Packed input with q and k rotated, kept in float32; x itself without rope."""
        if self.rope is None:
            return x
        # A copy in float32: the rotated q and k are not rounded to the storage dtype.
        out = memory.empty(x.shape, x, torch.float32)
        out.copy_(x)
        self._rotate(x, out, back=False)
        return out

    def _cotangent(self):
        """Empty packed output; float32 as long as it is yet to be rotated back."""
        return memory.empty(self.x.shape, self.x, torch.float32 if self.rope else self.dtype)

    def _back(self, out):
        if self.rope is None or out is None:
            return out
        self._rotate(out, out, back=True)
        return out.to(self.dtype)

    def _run(self, kernel, by_key, kind, *pointers, **flags):
        heads = self.heads
        n, tokens, _ = self.x.shape
        one = launch.attention(self.x, kind, tokens, heads.size, self.products)
        across = heads.key_value if by_key else heads.query
        with launch.on(self.x):
            kernel[(n * across, triton.cdiv(tokens, one.block))](
                *pointers, n * heads.query, tokens, heads.size, heads.scale, **flags,
                HQ=heads.query, HKV=heads.key_value, SIZE=heads.size, CAUSAL=heads.causal,
                WINDOW=heads.window or 0, PRECISION=self.products, BLOCK=one.block,
                CHUNK=CHUNK, D=max(16, triton.next_power_of_2(heads.size)), **one.options(),
            )  # fmt: skip

    def _output(self):
        n, tokens, _ = self.x.shape
        return memory.empty((n, tokens, self.heads.query * self.heads.size), self.x, self.dtype)

    def forward(self):
        """y and dy, each [N, T, query * size]."""
        y, dy = self._output(), self._output()
        self._run(
            _attention_forward_kernel, False, "forward",
            self.x, self.dx, self.mean, self.dmean, y, dy, self.stats,
        )  # fmt: skip
        return y, dy

    def _cotangents(self, g, finetuned):
        g_x = self._cotangent()
        pointers = (self.x, self.dx, self.mean, self.dmean, g, g_x, self.stats)
        for by_key, kernel in (
            (False, _attention_backward_rows_kernel),
            (True, _attention_backward_columns_kernel),
        ):
            self._run(kernel, by_key, "backward", *pointers, FINETUNED=finetuned)
        return self._back(g_x)

    def backward(self, g):
        """g_x [N, T, packed]."""
        self.g = g
        return self._cotangents(g, False)

    def adjoint(self, b):
        """b_x [N, T, packed]."""
        return self._cotangents(b, True)

    def tangent(self, t):
        """t_y [N, T, query * size]; after ``backward``."""
        self.t = self._rotated(t)
        self.tmean = self._means(self.t)
        t_y = self._output()
        self._run(
            _attention_tangent_kernel, False, "tangent",
            self.x, self.t, self.mean, self.tmean, t_y, self.stats,
        )  # fmt: skip
        return t_y

    def reverse(self, S, b, need_b):
        """S_x and b_x [N, T, packed]; after ``tangent``."""
        S_x = self._cotangent()
        b_x = self._cotangent() if need_b else None
        pointers = (
            self.x, self.dx, self.t, self.mean, self.dmean, self.tmean, self.g, S, b,
            S_x, b_x, self.stats,
        )  # fmt: skip
        for by_key, kernel in (
            (False, _attention_reverse_rows_kernel),
            (True, _attention_reverse_columns_kernel),
        ):
            self._run(kernel, by_key, "reverse", *pointers, NEED_B=need_b)
        return self._back(S_x), self._back(b_x)
