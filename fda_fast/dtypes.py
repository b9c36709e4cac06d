"""The dtype argument in the spellings that people have in their scripts."""

from __future__ import annotations

import warnings

import torch

from fda_fast.errors import InputError


def dtype_name(dtype: str | torch.dtype | None, torch_dtype: object = None) -> str | None:
    """The name that configurations use for a dtype.

    Args:
        dtype: ``torch.bfloat16``, "bfloat16", "torch.bfloat16", or None.
        torch_dtype: the same under transformers' older name, which warns.

    Raises:
        InputError: both given and different.
    """
    if torch_dtype is not None:
        warnings.warn("torch_dtype is deprecated: use dtype", FutureWarning, stacklevel=3)
        if dtype is not None and _name(dtype) != _name(torch_dtype):
            raise InputError(
                "dtype and torch_dtype", expected="one of them", got=f"{dtype} and {torch_dtype}"
            )
        return _name(torch_dtype)
    return None if dtype is None else _name(dtype)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
