"""A CUDA device that computes nothing: what a step would do on a card, without one.

Inside ``FakeCard()`` tensors on "cuda" have shapes, dtypes and a device, and no values
(torch's FakeTensorMode). The package's own launchers run up to the launch, whose arguments are
checked in its place. So a step that ran through here

- creates no tensor on another device and hands none to a kernel;
- reads nothing back to the host: there is nothing to read, so ``.item()``, ``bool(tensor)`` and
  indexing by a mask raise;
- multiplies in the types that torch accepts on a card;

and the card knows the bytes that the step held at its height, its launches, and the operations of
its matrix products.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from products import operands, product_flops
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# torch's allocator hands out multiples of this.
_BLOCK = 512
# What the launchers of the CUDA C++ kernels call.
_LAUNCHERS = (
    "alignment_dots",
    "alignment_evaluate",
    "alignment_mix",
    "alignment_coefficients",
    "adamw_step",
    "coefficients_update",
)


class FakeCard(TorchDispatchMode):
    """A context in which "cuda" tensors can be made and counted.

    Args:
        backend: whose launchers to use, "cuda" (falling back to "triton", as on a card) or
            "triton" alone.
        accumulates: whether bfloat16 products add to float32, as torch allows since 2.10.

    Attributes:
        held, peak: bytes of living tensors, and the most since ``reset``.
        given: bytes that are not to be counted as a step's, for the caller to set.
        launches: names of the kernels launched, in order.
        flops: of the matrix products, a multiplication and an addition counted as two.
        products: their number, by dtype of the operands.
    """

    def __init__(self, backend: str = "cuda", accumulates: bool = True) -> None:
        super().__init__()
        self._order = ("cuda", "triton") if backend == "cuda" else (backend,)
        self._accumulates = accumulates
        self._seen: dict[int, int] = {}
        self._recording = False
        self.held = self.peak = self.given = self.flops = 0
        self.launches: list[str] = []
        self.products: dict[torch.dtype, int] = {}

    def __enter__(self) -> FakeCard:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(FakeTensorMode())
        for patch in self._patches():
            self._stack.enter_context(patch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _patches(self) -> Iterator[contextlib.AbstractContextManager]:
        """In place of the driver: no stream, no launch, no address."""
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        from fda_fast import _native
        from fda_fast.kernels import launch as triton_launch
        from fda_fast.layers import precision
        from fda_fast.ops import dispatch
        from fda_fast.ops.cuda import adamw, alignment, call, coefficients

        yield mock.patch.object(dispatch, "_automatic", self._module)
        yield mock.patch.object(precision, "_widening", lambda _: (True, self._accumulates))
        for kind in (JITFunction, InterpretedFunction):
            yield mock.patch.object(kind, "run", _method(self._triton))
        yield mock.patch.object(triton_launch, "on", lambda _: contextlib.nullcontext())
        yield mock.patch.object(triton_launch, "architecture", lambda _: 90)
        yield mock.patch.object(torch.Tensor, "data_ptr", lambda _: 4096)
        if not torch.backends.cuda.is_built():
            yield _device_guard()
        functions = {f"cuda_{name}": functools.partial(self._cuda, name) for name in _LAUNCHERS}
        yield mock.patch.object(_native, "load", lambda: SimpleNamespace(**functions))
        launch = lambda name, like, *arguments: self._cuda(name, *arguments)  # noqa: E731
        for module in (adamw, alignment, call, coefficients):
            yield mock.patch.object(module, "launch", launch)

    def _module(self, stem: str, device: str, dtype: torch.dtype, wanted: str) -> ModuleType:
        """As ``dispatch._automatic`` on a machine with a card."""
        from fda_fast.ops import dispatch

        low = (torch.float32, torch.bfloat16, torch.float16)
        if device == "cuda" and dtype in low:
            for name in self._order:
                with contextlib.suppress(ModuleNotFoundError):
                    return dispatch._module(stem, name)
        return dispatch._module(stem, "torch")

    def _triton(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        name = kernel.fn.__name__
        sizes = grid if isinstance(grid, tuple) else (grid,)
        limits = (2**31 - 1, 65535, 65535)
        assert all(0 < n <= most for n, most in zip(sizes, limits, strict=False)), (name, sizes)
        for position, value in enumerate((*args, *keywords.values())):
            if isinstance(value, Tensor):
                assert value.is_cuda, f"argument {position} of {name} is on {value.device}"
                # Coefficients come with their strides; everything else is taken as dense.
                dense = value.is_contiguous() or "mix" in name
                assert dense, f"argument {position} of {name} has strides {value.stride()}"
            elif isinstance(value, int):
                assert -(2**63) <= value < 2**63
        self.launches.append(name)

    def _cuda(self, name: str, *arguments: Any) -> None:
        self.launches.append(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if self._recording:
            self._check_recordable(func, args, kwargs)
        if operands(func, args) is not None:
            out = self._product(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                self._count(tensor)
        return out

    def reset(self) -> None:
        """Count from here on."""
        self.peak, self.flops = self.held, 0
        self.launches.clear()
        self.products.clear()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, only what a CUDA graph can record: no copy from the host or to it."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def _check_recordable(self, func: Any, args: tuple, kwargs: dict) -> None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = {t.device.type for t in tensors}
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            places.add(torch.device(kwargs.get("device") or tensors[0].device).type)
            assert len(places) == 1, f"{func} between the host and the card"
        # Numbers of the host may enter as tensors without dimensions: arguments of the kernel.
        assert all(t.device.type != "cpu" or t.dim() == 0 for t in tensors), (
            f"{func} on a tensor of the host"
        )

    def _product(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        found = operands(func, args)
        assert found is not None
        a, b = found
        first = 0 if args[0] is a else 1
        assert a.dtype == b.dtype and a.device == b.device, (a, b)
        self.flops += product_flops(func, args)
        self.products[a.dtype] = self.products.get(a.dtype, 0) + 1
        for operand in (a, b):  # one of the strides must be 1, or cuBLAS is given a copy
            dense = 1 in operand.stride()[-2:] or 0 in operand.stride()
            assert dense, f"{func} of strides {operand.stride()}"
        if func._overloadname not in ("dtype", "dtype_out"):
            return func(*args, **kwargs)
        wide = args[first + 2]
        assert a.dtype in (torch.bfloat16, torch.float16) and wide == torch.float32
        if first:
            assert self._accumulates and args[0].dtype == wide
            assert args[0] is kwargs.get("out", args[0]), "would be copied first"
        out: Tensor | None = kwargs.get("out")
        shape = (*a.shape[:-1], b.shape[-1])
        if out is None:
            return a.new_empty(shape, dtype=wide)
        assert out.shape == shape and out.dtype == wide and out.device == a.device
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.held -= self._seen.pop(key)


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """torch built without CUDA can say which device is current: the meta device's answer serves.

    Its C++ part asks before most operations on "cuda" tensors, whether or not they hold values.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cuda, meta = 1, 14  # c10::DeviceType
    registry = (ctypes.c_void_p * (meta + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    before, registry[cuda] = registry[cuda], registry[meta]
    try:
        yield
    finally:
        registry[cuda] = before


def _method(function: Any) -> Any:
    """A function of a kernel as a method of its class."""
    return lambda kernel, *args, **keywords: function(kernel, *args, **keywords)


def put_on_card(layer: nn.Module, device: str = "cuda") -> nn.Module:
    """The layer's shapes on the fake card, in place; call inside the card's context."""
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(value)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                value = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                module._buffers[name] = value
    return layer
