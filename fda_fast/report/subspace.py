"""How much the main directions of anchors agree with those of real activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.report.spectrum import unfold

SHARE = 0.2
"""Dimensions kept, as a share of the width; as in the paper."""


@dataclass(frozen=True)
class Overlap:
    """Overlap of the leading subspaces of two sets of vectors.

    Attributes:
        ranks: dimensions k compared.
        similarity: tr(P_k Q_k) / k for each of them, in [0, 1].
        chance: what a random subspace has on average: k / d.
    """

    ranks: tuple[int, ...]
    similarity: tuple[float, ...]
    chance: tuple[float, ...]


def directions(vectors: Tensor) -> Tensor:
    """Right singular vectors [r, d] of anchors or activations, the strongest first; float64.

    Args:
        vectors: [n, T, d] or [n, d], any float dtype.

    Returns:
        Orthonormal rows, as many as the numerical rank of the vectors.
    """
    _, values, rows = torch.linalg.svd(unfold(vectors), full_matrices=False)
    floor = values[0] * max(rows.shape) * torch.finfo(vectors.dtype).eps
    return rows[: max(1, int((values > floor).sum()))]


def subspace_overlap(
    anchors: Tensor, activations: Tensor, ranks: Sequence[int] | None = None
) -> Overlap:
    """Overlap of the projections onto the k leading directions of anchors and of real data.

        similarity = tr(P_k Q_k) / k,     P_k = U_k U_k^T,  Q_k = V_k V_k^T

    which is the squared Frobenius norm of U_k^T V_k over k: 1 for equal subspaces, k / d on average
    for a random one.

    Args:
        anchors: [n, T, d] or [n, d].
        activations: [m, S, d] or [m, d], what the layer takes in on real inputs.
        ranks: the k to compare; default: a fifth of the width, as in the paper.

    Returns:
        ``Overlap``.

    Raises:
        InputError: different widths, a k that is not in 1 .. d, or more directions asked for than
            one of the sets spans: then the leading subspace is not defined.

    Cost: two thin singular value decompositions.
    Source: FDA, arXiv 2510.21223v1, section 3.1 and appendix D.
    """
    return overlap(directions(anchors), directions(activations), ranks)


def overlap(first: Tensor, second: Tensor, ranks: Sequence[int] | None = None) -> Overlap:
    """As ``subspace_overlap``, for ``directions`` at hand, [r, d] and [s, d]."""
    width = first.shape[-1]
    if second.shape[-1] != width:
        raise InputError("width of the activations", expected=width, got=second.shape[-1])
    chosen = tuple(ranks) if ranks is not None else (max(1, round(SHARE * width)),)
    spanned = min(len(first), len(second))
    for rank in chosen:
        if not 1 <= rank <= width:
            raise InputError("ranks", expected=f"from 1 to {width}", got=rank)
        if rank > spanned:
            raise InputError(
                f"a subspace of {rank} dimensions",
                expected=f"at most {spanned}, which is what the vectors span",
                fix="Give more vectors, or smaller ranks.",
            )
    # Squared inner products, summed over the leading blocks of every size at once.
    sums = (first[: max(chosen)] @ second[: max(chosen)].T).square().cumsum(0).cumsum(1)
    found = tuple(sums[rank - 1, rank - 1].item() / rank for rank in chosen)
    return Overlap(chosen, found, tuple(rank / width for rank in chosen))
