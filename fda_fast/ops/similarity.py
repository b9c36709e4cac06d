"""Feature similarity s of the pretrained output y and the fine-tuned y + dy.

    "cosine"  s = mean over anchors of cos(y, y + dy)
    "l2"      s = -mean over all elements of dy^2
    "l1"      s = -mean over all elements of |dy|

y, dy and t are contiguous [K, A, D]: A anchors, each flattened over its tokens. Everything is
multiplied by ``scale``: the alignment does not depend on it, and float32 is more comfortable with
sums over anchors than with means (scale = A).
"""

from __future__ import annotations

from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops import dispatch

KINDS = ("cosine", "l2", "l1")


def check_kind(kind: str) -> None:
    """Refuse an unknown kind with an InputError."""
    if kind not in KINDS:
        raise InputError("distance", expected=f"one of {KINDS}", got=repr(kind))


def forward(
    kind: str, y: Tensor, dy: Tensor, scale: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """scale * s [K], and its cotangent in the pretrained branch alone, g = d s / d y [K, A, D].

    Source: DESIGN of the four sweeps; cosine g = r / (n1 A), r = (dy - (h.dy) h) / n2.
    """
    return dispatch.implementation("similarity", y, backend).forward(kind, y, dy, scale)


def reverse(
    kind: str, y: Tensor, dy: Tensor, t: Tensor, scale: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The reverse sweep of <g(y, y + dy), t> with t constant: (S, b), each [K, A, D].

    b is the cotangent of the fine-tuned output, S the sum of the cotangents of both. For cosine,
    with h = y / n1, h_f = (y + dy) / n2, q = t / (n1 A) and Pq = q - (q.h) h:

        b = (Pq - (Pq.h_f) h_f) / n2
        S = -(h.dy) / (n1 n2) Pq - (q.r)(h_f / n2 + h / n1) - (q.h) r / n1
    """
    return dispatch.implementation("similarity", y, backend).reverse(kind, y, dy, t, scale)
