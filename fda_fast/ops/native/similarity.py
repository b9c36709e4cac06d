"""Feature similarity in C++; see fda_fast.ops.similarity. Sums in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.ops.memory import empty, empty_like
from fda_fast.ops.native.call import address, library, threads
from fda_fast.ops.reference import similarity as twin

_NUMBERS = {"cosine": 0, "l2": 1, "l1": 2}


def forward(kind: str, y: Tensor, dy: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See fda_fast.ops.similarity.forward."""
    if y.numel() == 0:
        return twin.forward(kind, y, dy, scale)
    tasks, anchors, d = y.shape
    s, g = empty((tasks,), y), empty_like(y)
    each = empty((tasks, anchors), y, torch.float64)
    library().similarity_forward(
        _NUMBERS[kind], tasks, anchors, d, address("y", y, y.shape),
        address("dy", dy, y.shape), scale, each.data_ptr(), s.data_ptr(), g.data_ptr(), threads(),
    )  # fmt: skip
    return s, g


def reverse(kind: str, y: Tensor, dy: Tensor, t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See fda_fast.ops.similarity.reverse."""
    if kind != "cosine" or y.numel() == 0:
        return twin.reverse(kind, y, dy, t, scale)
    S, b = empty_like(y), empty_like(y)
    library().similarity_reverse(
        *y.shape, address("y", y, y.shape), address("dy", dy, y.shape),
        address("t", t, y.shape), scale, S.data_ptr(), b.data_ptr(), threads(),
    )  # fmt: skip
    return S, b
