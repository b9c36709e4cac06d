"""Loads the native extension fda_fast._C once, and remembers why it could not be."""

from __future__ import annotations

import importlib
from types import ModuleType

# torch brings the OpenMP runtime that the extension shares; two of them would fight over cores.
import torch

_FIX = (
    "Reinstall fda_fast from source with a C++17 compiler on the PATH (pip install . ; "
    "FDA_FAST_CUDA=1 to require the CUDA part as well), or use backend='torch'."
)
_module: ModuleType | None = None
_error: ImportError | None = None
_tried = False


def _load_once() -> None:
    global _module, _error, _tried
    if _tried:
        return
    _tried = True
    try:
        _module = importlib.import_module("fda_fast._C")
    except ImportError as error:
        _error = error


def reason() -> str:
    """Why the extension cannot be used, or "" if it can."""
    _load_once()
    if _module is not None:
        return ""
    return f"the native extension fda_fast._C is not there ({_error})"


def cuda_reason() -> str:
    """Why the CUDA part of the extension cannot be used, or "" if it can."""
    missing = reason()
    if missing:
        return missing
    if not load().CUDA_ARCHS:
        return "fda_fast was built without nvcc, so its extension has no CUDA part"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def load() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it was not built or cannot be loaded; says why and how to repair it.
    """
    _load_once()
    if _module is None:
        raise RuntimeError(f"{reason()}. {_FIX}") from _error
    return _module
