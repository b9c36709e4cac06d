"""Handing tensors to fda_fast._C: addresses, after the checks that the C++ side cannot make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast import _native
from fda_fast.errors import InputError


def address(name: str, tensor: Tensor | None, shape: Sequence[int]) -> int:
    """Where the elements of a tensor start; 0, which kernels read as zero or unwanted, for None.

    Raises:
        InputError: it is not a contiguous float32 CPU tensor of this shape.
    """
    if tensor is None:
        return 0
    fits = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    if not fits or tensor.shape != shape:
        raise InputError(
            name,
            expected=f"contiguous torch.float32 of shape {[*shape]} on the CPU",
            got=f"{tensor.dtype} of shape {[*tensor.shape]}, strides {tensor.stride()}, "
            f"on {tensor.device}",
        )
    return tensor.data_ptr()


library = _native.load
threads = torch.get_num_threads
