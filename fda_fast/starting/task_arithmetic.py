"""Task Arithmetic: the pretrained tensor plus the scaled sum of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.starting.deltas import Deltas, as_list, working_dtype


def task_arithmetic(
    pretrained: Tensor, deltas: Deltas, scaling: float | Sequence[float] = 0.3
) -> Tensor:
    """Merge one tensor: W = W_0 + sum_k lambda_k tau_k.

    Args:
        pretrained: [*s], floating point.
        deltas: K task vectors, a tensor [K, *s] or a sequence of tensors [*s].
        scaling: lambda for all tasks, or K of them.

    Returns:
        [*s] float32 (float64 if ``pretrained`` is).

    Raises:
        InputError: shapes differ, or another number of scalings than task vectors.

    Source: Ilharco et al., arXiv 2212.04089; 0.3 is FDA's coefficient for vision (its code).
    """
    listed = as_list(deltas, pretrained.shape)
    factors = [scaling] * len(listed) if isinstance(scaling, int | float) else list(scaling)
    if len(factors) != len(listed):
        raise InputError("scaling", expected=f"{len(listed)} values", got=len(factors))
    dtype = working_dtype(pretrained)
    total = torch.zeros_like(pretrained, dtype=torch.float64)
    for factor, delta in zip(factors, listed, strict=True):
        total.add_(delta, alpha=factor)
    return total.add_(pretrained.detach()).to(dtype)
