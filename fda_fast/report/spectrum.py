"""The singular spectrum of anchors, and how long its tail is, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fda_fast.errors import InputError


@dataclass(frozen=True)
class Spectrum:
    """Singular values of vectors, and what is said about them in one number.

    Attributes:
        values: [r] singular values divided by the largest, falling; float64.
        stable_rank: sum of their squares: 1 for one direction, r for a flat spectrum.
        effective_rank: exp of the entropy of values / sum(values) (Roy and Vetterli, 2007), in
            [1, r].
        gini: Gini coefficient of the values, in [0, 1): 0 for a flat spectrum, towards 1 where few
            of many values hold everything. The measure of a long tail here.
    """

    values: Tensor
    stable_rank: float
    effective_rank: float
    gini: float


def unfold(anchors: Tensor) -> Tensor:
    """Anchors [n, T, d] or [n, d] as vectors [n T, d], float64."""
    if anchors.dim() not in (2, 3) or anchors.numel() == 0:
        raise InputError("anchors", expected="[n, T, d] or [n, d]", got=list(anchors.shape))
    if not bool(torch.isfinite(anchors).all()):
        raise InputError("anchors", expected="finite values", got="NaN or infinity")
    return anchors.detach().reshape(-1, anchors.shape[-1]).double()


def spectrum(anchors: Tensor) -> Spectrum:
    """Normalised singular values of anchors unfolded to vectors.

    Args:
        anchors: [n, T, d] or [n, d], any float dtype; not centred.

    Returns:
        ``Spectrum`` of min(n T, d) values.

    Raises:
        InputError: another shape, values that are not finite, or zeros only.

    Cost: singular values of a [n T, d] matrix in float64.
    Source: FDA, arXiv 2510.21223v1, section 3.1; the numbers beside the curve are ours.
    """
    return of_values(torch.linalg.svdvals(unfold(anchors)))


def of_values(values: Tensor) -> Spectrum:
    """The spectrum of singular values at hand, [r], falling."""
    largest = values.max()
    if not bool(largest > 0):
        raise InputError("anchors", expected="a value other than zero", got="zeros only")
    values = values / largest
    share = values / values.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    rising = values.sort().values
    count = len(values)
    rank = torch.arange(1, count + 1, dtype=values.dtype)
    gini = (2 * rank - count - 1).dot(rising) / (count * rising.sum())
    return Spectrum(
        values, values.square().sum().item(), entropy.exp().item(), gini.clamp_min(0).item()
    )
