"""Attention as an operation of a program, and operations on single heads of packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fda_fast.layers.precision import Precision
from fda_fast.layers.program import Node
from fda_fast.ops import attention
from fda_fast.ops.attention import Heads


class Attention(Node):
    """Softmax attention over packed rows [q heads | k heads | v heads], without parameters.

    Args:
        heads: layout, scale, causality, window and softcap.
        tokens: T; the rows [K, R] are K * n sequences of T.
        precision: of the matrix products.
        rope: (cos, sin), each [T, r], rotated into the first r columns of q and k heads; or None.
    """

    def __init__(
        self,
        heads: Heads,
        tokens: int,
        precision: Precision,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.heads = heads
        self.tokens = tokens
        self.precision = precision
        self.rope = rope
        self._sweeps: Any = None

    def _sequences(self, x: Tensor) -> Tensor:
        """[K, R, width] -> [K * n, T, width]."""
        return x.reshape(-1, self.tokens, x.shape[-1])

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        self._tasks = x.shape[0]
        y, dy, self._sweeps = attention.forward(
            self._sequences(x),
            None if dx is None else self._sequences(dx),
            self.heads,
            rope=self.rope,
            precision=self.precision,
        )
        return self._rows(y), None if dy is None else self._rows(dy)

    def _rows(self, y: Tensor) -> Tensor:
        return y.reshape(self._tasks, -1, y.shape[-1])

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.backward``; computed in any case, the later sweeps need its parts."""
        return self._rows(self._sweeps.backward(self._sequences(g)))

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        assert t is not None, "attention without a Linear before it has no tangent to carry"
        return self._rows(self._sweeps.tangent(self._sequences(t)))

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``."""
        S_x, b_x = self._sweeps.reverse(self._sequences(S), self._sequences(b), need_b)
        self.release()
        return self._rows(S_x), None if b_x is None else self._rows(b_x)

    def adjoint(self, b: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.adjoint``."""
        b_x = self._sweeps.adjoint(self._sequences(b)) if need_input else None
        self.release()
        return None if b_x is None else self._rows(b_x)

    def release(self) -> None:
        """See ``Node.release``."""
        self._sweeps = None


class PerHead(Node):
    """Nodes applied to every head of a packed row: q and k normalisation (Qwen 3, Gemma 3).

    Args:
        segments: (number of heads, node on [K, R * heads, size] or None for unchanged), in the
            order of the packed columns.
        size: width of a head.
    """

    def __init__(self, segments: Sequence[tuple[int, Node | None]], size: int) -> None:
        self.segments = list(segments)
        self.size = size

    def _split(self, x: Tensor | None) -> list[Any]:
        """[K, R, sum of heads * size] -> [K, R * heads, size] for every segment."""
        if x is None:
            return [None] * len(self.segments)
        parts = x.split([count * self.size for count, _ in self.segments], dim=2)
        return [part.reshape(x.shape[0], -1, self.size) for part in parts]

    def _join(self, parts: Sequence[Tensor | None], rows: int) -> Any:
        """Inverse of ``_split``; a missing part is zero, nothing at all is None."""
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return None
        columns = [
            like.new_zeros(like.shape[0], rows, count * self.size)
            if part is None
            else part.reshape(like.shape[0], rows, count * self.size)
            for part, (count, _) in zip(parts, self.segments, strict=True)
        ]
        return torch.cat(columns, dim=2)

    def leaves(self) -> Iterator[Node]:
        """The operations inside, in order."""
        for _, node in self.segments:
            if node is not None:
                yield from node.leaves()

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        pairs = [
            (part, dpart) if node is None else node.forward(part, dpart)
            for (_, node), part, dpart in zip(
                self.segments, self._split(x), self._split(dx), strict=True
            )
        ]
        rows = x.shape[1]
        return self._join([y for y, _ in pairs], rows), self._join([dy for _, dy in pairs], rows)

    def _each(self, method: str, x: Tensor, need_input: bool) -> Tensor | None:
        parts = [
            part if node is None else getattr(node, method)(part, need_input)
            for (_, node), part in zip(self.segments, self._split(x), strict=True)
        ]
        return self._join(parts, x.shape[1]) if need_input else None

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.backward``."""
        return self._each("backward", g, need_input)

    def adjoint(self, b: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.adjoint``."""
        return self._each("adjoint", b, need_input)

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        parts = [
            part if node is None else node.tangent(part)
            for (_, node), part in zip(self.segments, self._split(t), strict=True)
        ]
        rows = 0 if t is None else t.shape[1]
        return self._join(parts, rows)

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``."""
        pairs = [
            (S_part, b_part) if node is None else node.reverse(S_part, b_part, need_b)
            for (_, node), S_part, b_part in zip(
                self.segments, self._split(S), self._split(b), strict=True
            )
        ]
        rows = S.shape[1]
        S_x = self._join([S_part for S_part, _ in pairs], rows)
        return S_x, self._join([b_part for _, b_part in pairs], rows) if need_b else None

    def refresh(self) -> None:
        """See ``Node.refresh``."""
        for _, node in self.segments:
            if node is not None:
                node.refresh()

    def release(self) -> None:
        """See ``Node.release``."""
        for _, node in self.segments:
            if node is not None:
                node.release()
