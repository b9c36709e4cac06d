"""CPU tensors for the CUDA backend: its Python, its bindings and its kernels, without a card."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fda_fast import _native
from fda_fast.ops import dispatch

# The handle of the current stream; launches on another one fail.
STREAM = 0x5EED


@dataclass
class _Place:
    """Where a tensor lies, without keeping it alive."""

    name: str
    bytes: int
    storage: StorageWeakRef


class Launchers:
    """fda_fast._C with an emulated CUDA part.

    A launch may touch the tensors whose addresses are among its arguments, and those must still
    exist.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._places: dict[int, _Place] = {}
        module.expect_stream(STREAM)
        module.take_log()

    def address(self, tensor: torch.Tensor) -> int:
        """Where the tensor starts; kernels may touch its elements, and nothing around them."""
        begin = torch._C.TensorBase.data_ptr(tensor)
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = (last + 1) * tensor.element_size()
            known = self._places.get(begin)
            if known is None or known.bytes < size or known.storage.expired():
                storage = StorageWeakRef(tensor.untyped_storage())
                self._places[begin] = _Place(f"{tensor.dtype} {[*tensor.shape]}", size, storage)
        return begin

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not name.startswith("cuda_"):
            return function

        def launch(*arguments: object) -> None:
            places = {a: self._places[a] for a in _numbers(arguments) if a in self._places}
            self._places.clear()
            dead = [place.name for place in places.values() if place.storage.expired()]
            assert not dead, f"{name} reads freed memory: {dead}"
            for begin, place in places.items():
                self._module.allow(begin, place.bytes, place.name)
            try:
                function(*arguments)
            finally:
                self._module.forbid_all()

        return launch


def _numbers(arguments: Iterable[object]) -> Iterator[int]:
    for one in arguments:
        if isinstance(one, int):
            yield one
        elif isinstance(one, (tuple, list)):
            yield from _numbers(one)


def install(module: ModuleType, patch: Any) -> None:
    """Point the CUDA backend at ``module`` and CPU tensors at the CUDA backend.

    Args:
        module: of ``emulated_build.Emulator``.
        patch: pytest's monkeypatch.
    """
    launchers = Launchers(module)
    refusal = dispatch._refusal

    def emulated(stem: str, device: str, dtype: torch.dtype, name: str) -> str:
        if name == "cuda" and device == "cpu":
            device = "cuda"
        return refusal(stem, device, dtype, name)

    patch.setattr(_native, "load", lambda: launchers)
    patch.setattr(_native, "cuda_reason", lambda: "")
    patch.setattr(dispatch, "_refusal", emulated)
    patch.setattr(dispatch, "_automatic", dispatch._automatic.__wrapped__)
    patch.setattr(dispatch, "_named", dispatch._named.__wrapped__)
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    patch.setattr(torch.Tensor, "data_ptr", lambda tensor: launchers.address(tensor))
