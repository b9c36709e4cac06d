"""Task vectors of one tensor, as every starting point takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast.errors import InputError

Deltas = Tensor | Sequence[Tensor]
"""K task vectors of one tensor: [K, *s], or K tensors [*s]."""


def as_list(deltas: Deltas, shape: torch.Size | None = None) -> list[Tensor]:
    """The task vectors one by one, checked.

    Raises:
        InputError: none at all, or one that is no floating-point tensor of the common shape.
    """
    listed = list(deltas)
    if not listed:
        raise InputError("task vectors", expected="at least one", got="none")
    shape = listed[0].shape if shape is None else shape
    for index, delta in enumerate(listed):
        if delta.shape != shape or not delta.is_floating_point():
            raise InputError(
                f"task vector {index}",
                expected=f"floating point {tuple(shape)}",
                got=f"{delta.dtype} {tuple(delta.shape)}",
            )
    return [delta.detach() for delta in listed]


def as_matrices(deltas: Deltas) -> list[Tensor]:
    """Like ``as_list``, for matrices [o, i] in the working dtype, finite and not all zero-sized.

    Raises:
        InputError: as above; not a matrix; NaN or infinity in one.
    """
    listed = as_list(deltas)
    if listed[0].ndim != 2:
        raise InputError("task vectors", expected="matrices", got=tuple(listed[0].shape))
    listed = [delta.to(working_dtype(delta)) for delta in listed]
    for index, delta in enumerate(listed):
        # A sum is finite only if every term is, short of overflow, and allocates nothing.
        if not bool(torch.isfinite(delta.sum(dtype=torch.float64))):
            raise InputError(f"task vector {index}", expected="finite numbers", got="NaN or Inf")
    return listed


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
