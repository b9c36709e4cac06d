"""Feature similarity of two branches that are nearly equal, in plain torch.

Cosine, per anchor: n1 = |y|, n2 = |y + dy|, h = y / n1, h_f = (y + dy) / n2, and the residual
r = (dy - (h.dy) h) / n2, which is h_f - (h.h_f) h without cancellation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# F.cosine_similarity's floor of each norm.
_EPS = 1e-8


class _Rows(NamedTuple):
    h: Tensor  # [K, A, D]
    h_f: Tensor  # [K, A, D]
    r: Tensor  # [K, A, D]
    n1: Tensor  # [K, A, 1]
    n2: Tensor  # [K, A, 1]
    along: Tensor  # [K, A, 1], h.dy


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _rows(y: Tensor, dy: Tensor) -> _Rows:
    y_f = y + dy
    n1 = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(_EPS)
    n2 = torch.linalg.vector_norm(y_f, dim=-1, keepdim=True).clamp_min(_EPS)
    h = y / n1
    along = _dot(h, dy)
    return _Rows(h, y_f / n2, (dy - along * h) / n2, n1, n2, along)


def forward(kind: str, y: Tensor, dy: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See fda_fast.ops.similarity.forward."""
    anchors, width = y.shape[1:]
    if kind == "l2":
        weight = scale / (anchors * width)
        return -weight * dy.square().sum((1, 2)), 2 * weight * dy
    if kind == "l1":
        weight = scale / (anchors * width)
        return -weight * dy.abs().sum((1, 2)), weight * dy.sign()
    rows = _rows(y, dy)
    weight = scale / anchors
    s = weight * _dot(rows.h, rows.h_f).sum((1, 2))
    return s, weight * rows.r / rows.n1


def reverse(kind: str, y: Tensor, dy: Tensor, t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See fda_fast.ops.similarity.reverse."""
    anchors, width = y.shape[1:]
    if kind == "l2":
        return torch.zeros_like(t), 2 * scale / (anchors * width) * t
    if kind == "l1":
        return torch.zeros_like(t), torch.zeros_like(t)
    h, h_f, r, n1, n2, along = _rows(y, dy)
    b = t * (scale / anchors) / n1
    b_h = _dot(b, h)
    Pb = b - b_h * h
    S = -along / (n1 * n2) * Pb - _dot(b, r) * (h_f / n2 + h / n1) - b_h * r / n1
    return S, (Pb - _dot(Pb, h_f) * h_f) / n2
