"""Feature similarity: the end of a program, per anchor over all its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fda_fast.ops import similarity


class Similarity:
    """s(X) of the two branches' outputs, scaled by the number of anchors: what parts add up.

    Args:
        kind: "cosine", "l2" or "l1".
        tokens: T, rows per anchor.
    """

    def __init__(self, kind: str, tokens: int) -> None:
        similarity.check_kind(kind)
        self.kind, self.tokens = kind, tokens
        self.scale = 1.0
        self._y: Any = None  # kept between sweeps, [K, A, T * d]
        self._dy: Any = None

    @property
    def output(self) -> Tensor:
        """The pretrained output kept for ``reverse``, [K, A, T * d]."""
        return self._y

    def forward(self, y: Tensor, dy: Tensor) -> Tensor:
        """g [K, R, d], the cotangent of scale * s in the pretrained branch."""
        tasks, rows, width = y.shape
        anchors = rows // self.tokens
        self.scale = float(anchors)
        self._y = y.view(tasks, anchors, self.tokens * width)
        self._dy = dy.view(self._y.shape)
        _, g = similarity.forward(self.kind, self._y, self._dy, self.scale)
        return g.view(y.shape)

    def reverse(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """S and b at the output, from the tangent there; each [K, R, d]."""
        shape = t.shape
        y, dy = self._y, self._dy
        self._y = self._dy = None
        S, b = similarity.reverse(self.kind, y, dy, t.view(y.shape), self.scale)
        return S.view(shape), b.view(shape)
