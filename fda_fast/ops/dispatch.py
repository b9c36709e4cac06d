"""Which implementation of an operation serves a call.

Every backend of an operation is a module of the same function names:

    torch   fda_fast.ops.reference.<stem>   any device, any dtype, the definition
    cpu     fda_fast.ops.native.<stem>      C++; float32 on the CPU
    triton  fda_fast.kernels.<stem>         CUDA devices; the CPU under TRITON_INTERPRET=1
    cuda    fda_fast.ops.cuda.<stem>        CUDA C++; CUDA devices
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fda_fast import _native

_PACKAGES = {
    "torch": "fda_fast.ops.reference",
    "cpu": "fda_fast.ops.native",
    "triton": "fda_fast.kernels",
    "cuda": "fda_fast.ops.cuda",
}
# What auto tries on each kind of device, best first; torch ends every list.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def available() -> dict[str, str]:
    """Each backend's name with "" if it can run here, else the reason why it cannot."""
    return {name: _reason(name) for name in _PACKAGES}


def implementation(stem: str, tensor: Tensor, backend: str = "auto") -> ModuleType:
    """The module that computes operation ``stem`` on ``tensor``.

    Args:
        stem: name of the operation, "activation" for instance.
        tensor: an argument of the call; its device and dtype decide.
        backend: "auto", "torch", "cpu", "triton" or "cuda". "auto" is the fastest that can serve
            the tensor, or the one that the environment variable FDA_FAST_BACKEND names if that
            one can; a tensor that requires grad gets the torch twin, which autograd can follow.

    Raises:
        RuntimeError: the named backend cannot run here, or cannot serve this tensor; says why.
    """
    if torch.compiler.is_compiling():
        return _traced(stem)
    if backend == "auto":
        if tensor.requires_grad and torch.is_grad_enabled():
            return _module(stem, "torch")
        wanted = os.environ.get("FDA_FAST_BACKEND", "auto")
        return _automatic(stem, tensor.device.type, tensor.dtype, wanted)
    return _named(stem, tensor.device.type, tensor.dtype, backend)


def _traced(stem: str) -> Any:
    """For torch.compile: one opaque op per call, or the torch twin, which it can trace."""
    from fda_fast.ops.library import TRACED

    return TRACED[stem] if stem in TRACED else _module(stem, "torch")


@functools.cache
def _automatic(stem: str, device: str, dtype: torch.dtype, wanted: str) -> ModuleType:
    if wanted != "auto" and wanted not in _PACKAGES:
        raise RuntimeError(
            f"FDA_FAST_BACKEND={wanted} is not a backend; expected auto or one of {[*_PACKAGES]}"
        )
    names = _PREFERRED.get(device, ()) if wanted == "auto" else (wanted,)
    for name in names:
        if not _refusal(stem, device, dtype, name):
            return _module(stem, name)
    return _module(stem, "torch")


@functools.cache
def _named(stem: str, device: str, dtype: torch.dtype, name: str) -> ModuleType:
    if name not in _PACKAGES:
        raise RuntimeError(f"backend {name!r} is not known; expected auto or one of {[*_PACKAGES]}")
    why = _refusal(stem, device, dtype, name)
    if why:
        raise RuntimeError(f"backend {name!r} cannot compute {stem} on {dtype} on {device}: {why}")
    return _module(stem, name)


def _refusal(stem: str, device: str, dtype: torch.dtype, name: str) -> str:
    """Why backend ``name`` cannot serve such a tensor, or ""."""
    why = _reason(name)
    if why or name == "torch":
        return why
    if importlib.util.find_spec(f"{_PACKAGES[name]}.{stem}") is None:
        return f"this operation has no {name} implementation"
    if name == "cpu":
        if device != "cpu":
            return "it runs on CPU tensors"
        return "" if dtype == torch.float32 else "it computes in float32"
    if dtype not in _LOW_PRECISION:
        return "it computes in float32 and below"
    if device != "cuda" and not (name == "triton" and device == "cpu" and _interpreted()):
        return "it runs on CUDA tensors"
    return ""


@functools.cache
def _module(stem: str, name: str) -> ModuleType:
    return importlib.import_module(f"{_PACKAGES[name]}.{stem}")


def _reason(name: str) -> str:
    if name == "cpu":
        return _native.reason()
    if name == "cuda":
        return _native.cuda_reason()
    if name == "triton":
        return _triton_reason()
    return ""


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if not (torch.cuda.is_available() or _interpreted()):
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    return ""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
