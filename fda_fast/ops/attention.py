"""Softmax attention over packed heads: four sweeps and the adjoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops import dispatch


@dataclass(frozen=True)
class Heads:
    """How a packed row [q heads | k heads | v heads] is to be read.

    Attributes:
        query: number of query heads; a multiple of ``key_value``. Query head h reads key/value
            head h // (query / key_value).
        key_value: number of key heads, and of value heads.
        size: width of every head.
        scale: factor on q . k.
        causal: a token sees itself and those before it only.
        window: of these, the last ``window`` ones (itself included); None for all.
        softcap: c of c * tanh(score / c) before the softmax (Gemma 2); None for none.
    """

    query: int
    key_value: int
    size: int
    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None

    @property
    def packed(self) -> int:
        """Width of a packed row."""
        return (self.query + 2 * self.key_value) * self.size


class Sweeps(Protocol):
    """One evaluation after its forward: the later sweeps, in the order of ``layers.program``.

    All tensors packed like the forward's: [N, T, packed] at the input, [N, T, query * size] at
    the output.
    """

    def backward(self, g: Tensor) -> Tensor:
        """g_x = J(x)^T g."""

    def tangent(self, t: Tensor) -> Tensor:
        """t_y = J(x) t; after ``backward``."""

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """S_x = J(x)^T S + (J(x+dx) - J(x))^T b + d/dx <g, J(x) t>, and b_x = J(x+dx)^T b."""

    def adjoint(self, b: Tensor) -> Tensor:
        """b_x = J(x+dx)^T b; directly after the forward."""


def forward(
    x: Tensor,
    dx: Tensor | None,
    heads: Heads,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    precision: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Sweeps]:
    """Attention of the pretrained branch, its difference to the fine-tuned one, and what follows.

        y = softmax(mask(scale * q k^T)) v      dy = attention(x + dx) - attention(x)

    dy is formed from dq, dk, dv and the softmax difference P (e - m) / (1 + m), e = expm1 of the
    score differences, m its mean under P: nothing nearly equal is subtracted.

    Args:
        x: [N, T, packed], q, k and v of N sequences (tasks times anchors); contiguous.
        dx: like x; fine-tuned minus pretrained. None means exactly zero; dy is None then.
        heads: the layout and the kind of attention.
        rope: (cos, sin), each [T, r] with r <= size even: rotary embedding of the first r columns
            of every q and k head, halves paired as Hugging Face's ``rotate_half``.
        precision: ``imitates``, ``operand(x)``, ``matmul(a, b, out)`` and ``accumulate(out, a, b)``
            over 3-D tensors, as ``layers.precision.Precision`` has them; None for plain products
            in the dtype of x. One that imitates a GPU on a CPU is computed by the torch twin.
        backend: "auto", "torch", "cpu", "triton" or "cuda".

    Returns:
        y and dy [N, T, query * size], and the ``Sweeps`` that hold what the later sweeps need.

    Raises:
        InputError: shapes that do not fit ``heads``.
        RuntimeError: ``backend`` cannot run here; the message says why.

    Cost: 2 N T^2 (query * size) operations per product; 6 products forward, 4 backward, 4 tangent,
    16 reverse. The torch twin holds 4 matrices [N, query, T, T] between the sweeps.
    See ``fda_fast.ops.reference.attention`` for the defining implementation.
    """
    if x.dim() != 3 or x.shape[2] != heads.packed or heads.query % heads.key_value:
        raise InputError(
            "packed attention input",
            expected=f"[N, T, {heads.packed}] for {heads}",
            got=list(x.shape),
        )
    if dx is not None and dx.shape != x.shape:
        raise InputError("dx of attention", expected=list(x.shape), got=list(dx.shape))
    if precision is not None and precision.imitates and backend == "auto":
        backend = "torch"
    module = dispatch.implementation("attention", x, backend)
    return module.forward(x, dx, heads, rope=rope, precision=precision)
