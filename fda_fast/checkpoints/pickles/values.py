"""What a pickle becomes here: plain Python containers, and the records below. Nothing runs.

A class or function that a pickle names is a ``Reference``: its name, never the thing itself. An
instance of such a class is a ``Record``: the name again, with the state the pickle holds for it.
Tensors and arrays are descriptions of bytes in the file, read only when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fda_fast.checkpoints.tensorfile import TensorFile, TensorInfo

MAX_DIMENSIONS = 64
MAX_NAME = 1024
# Parameters that code may have replaced by plain tensors, which torch keeps as attributes and
# leaves out of state dicts: the published adaptation saves its refined layers so.
_REPLACED = ("weight", "bias", "in_proj_weight", "in_proj_bias")
# A model has thousands of modules and tensors; one that seems to have more refers to its parts in
# circles, or to each so often that listing them would not end.
_MAX_MODULES = 100_000
_MAX_TENSORS = 200_000


class Malformed(Exception):
    """What the file holds does not fit together; the message says what."""


class Refused(Exception):
    """The pickle names code that has no place in a checkpoint; the message is the name."""


@dataclass(frozen=True)
class Reference:
    """A class or function by its full name, "torch.nn.functional.gelu". Cannot be called."""

    name: str


@dataclass(eq=False)
class Record:
    """An object of a class that was neither imported nor called.

    Attributes:
        name: its class: "torch.nn.modules.linear.Linear".
        args: what its constructor would have been given.
        state: its attributes by name; for a module with ``_parameters``, ``_buffers`` and
            ``_modules``. Another kind of state is kept under "".
    """

    name: str
    args: tuple[Any, ...] = ()
    state: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<record of {self.name}>"

    @property
    def kind(self) -> str:
        """The class without its module: "Linear"."""
        return self.name.rpartition(".")[2]

    @property
    def is_module(self) -> bool:
        """Whether its state is that of an ``nn.Module``."""
        parts = [(self.state or {}).get(key) for key in ("_parameters", "_buffers", "_modules")]
        return all(isinstance(part, dict) for part in parts)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, parameter, buffer or sub-module by its name.

        Cost: a look-up.
        """
        state = self.state or {}
        if name in state:
            return state[name]
        if self.is_module:
            for part in ("_parameters", "_buffers", "_modules"):
                if name in state[part]:
                    return state[part][name]
        return default

    def children(self) -> dict[str, Record]:
        """Sub-modules by name, without those that are None."""
        if not self.is_module:
            return {}
        found = self.state["_modules"] if self.state else {}
        return {n: m for n, m in found.items() if isinstance(n, str) and isinstance(m, Record)}

    def submodule(self, path: str) -> Record | None:
        """The module at "visual.transformer", "" being this one; None if there is none."""
        module: Record | None = self
        for name in path.split(".") if path else ():
            module = None if module is None else module.children().get(name)
        return module

    def named_modules(self) -> Iterator[tuple[str, Record]]:
        """(path, module) of this module, "", and all below, as torch orders them.

        A module that is there twice comes twice, as in a state dict.

        Raises:
            Malformed: they contain each other, or are too many.
        """
        pending = [("", self)]
        seen = 1
        while pending:
            path, module = pending.pop()
            yield path, module
            children = module.children()
            seen += len(children)
            if seen > _MAX_MODULES:
                raise Malformed("modules that contain each other, or too many")
            pending += [(_below(path, name), children[name]) for name in reversed(children)]

    def state_dict(self) -> dict[str, PickledTensor]:
        """Parameters and persistent buffers by name, as the module's own ``state_dict()`` has.

        Parameters that were replaced by plain tensors are in it too.

        Raises:
            Malformed: something else among them, or modules that contain each other.
        """
        found: dict[str, PickledTensor] = {}
        for path, module in self.named_modules():
            for name, tensor in module.tensors().items():
                found[_below(path, name)] = tensor
            if len(found) > _MAX_TENSORS:
                raise Malformed("modules with too many tensors")
        return found

    def tensors(self) -> dict[str, PickledTensor]:
        """Parameters, also those replaced by plain tensors, and persistent buffers of this module.

        Raises:
            Malformed: something else among them.
        """
        if self.state is None or not self.is_module:
            return {}
        transient = self.state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else set()
        found: dict[str, PickledTensor] = {}
        for part in ("_parameters", "_buffers"):
            for name, value in self.state[part].items():
                if value is None or (part == "_buffers" and name in transient):
                    continue
                if not isinstance(name, str) or not isinstance(value, PickledTensor):
                    raise Malformed(f"{describe(value)} among the tensors of {self.name}")
                found[name] = value
        for name in _REPLACED:
            value = self.state.get(name)
            if isinstance(value, PickledTensor) and name not in found:
                found[name] = value
        return found


def _below(path: str, name: str) -> str:
    if len(path) + len(name) > MAX_NAME:
        raise Malformed("modules nested too deep")
    return f"{path}.{name}" if path else name


@dataclass(eq=False)
class Storage:
    """Bytes of the file that tensors are views of.

    Attributes:
        key: how the pickle calls it.
        nbytes: its size.
        offset: position of the first byte in the file; None until it is known.
    """

    key: str
    nbytes: int
    offset: int | None = None
    base: Storage | None = None
    base_offset: int = 0

    @property
    def position(self) -> int:
        """Position in the file of its first byte."""
        if self.base is not None:
            return self.base.position + self.base_offset
        if self.offset is None:
            raise Malformed(f"storage {self.key!r:.40} is not in the file")
        return self.offset


@dataclass(frozen=True)
class StorageType:
    """torch.FloatStorage and its kin; torch.UntypedStorage counts as one of bytes."""

    dtype: torch.dtype


@dataclass(frozen=True)
class TypedStorage:
    """A storage with the dtype its elements were pickled as."""

    storage: Storage
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.storage.nbytes // self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A dense tensor: a view of a storage, checked to lie in it.

    Attributes:
        storage: the bytes.
        dtype: of the elements.
        shape: sizes.
        stride: in elements.
        start: of the first element in the storage, in elements.
        is_parameter: whether it was an ``nn.Parameter``.
    """

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    is_parameter: bool = False

    def __repr__(self) -> str:
        return f"<tensor {list(self.shape)} {str(self.dtype)[6:]}>"

    def info(self, file: TensorFile) -> TensorInfo:
        """Where it lies in its file, for ``TensorFile.read``.

        Raises:
            Malformed: beyond the end of the file.
        """
        size = self.dtype.itemsize
        nbytes = math.prod(self.shape) * size
        if nbytes == 0:
            return TensorInfo(self.shape, self.dtype, file.path, 0)
        stride = None if self.stride == _contiguous(self.shape, self.stride) else self.stride
        offset = self.storage.position + self.start * size
        info = TensorInfo(self.shape, self.dtype, file.path, nbytes, offset, stride)
        if offset + info.span > file.size:
            raise Malformed(f"storage {self.storage.key!r:.40} beyond the end of the file")
        return info


def tensor_view(storage: TypedStorage, start: Any, shape: Any, stride: Any) -> PickledTensor:
    """A tensor over part of a storage.

    Raises:
        Malformed: sizes, strides or offset that are no such numbers, elements outside the
            storage, or more elements than it has (strides of 0 that would fill the memory).
    """
    for what, value in (("shape", shape), ("strides", stride)):
        if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS:
            raise Malformed(f"a {what} that is {describe(value)}")
        if not all(type(size) is int and 0 <= size < 1 << 62 for size in value):
            raise Malformed(f"the {what} {value!r:.80}")
    if len(shape) != len(stride):
        raise Malformed(f"{len(shape)} sizes and {len(stride)} strides")
    if type(start) is not int or not 0 <= start < 1 << 62:
        raise Malformed(f"a tensor that starts at element {start!r:.40}")
    numel = math.prod(shape)
    if math.prod(max(size, 1) for size in shape) >= 1 << 62:
        raise Malformed(f"the shape {list(shape)!s:.80}")
    last = start + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if numel and (numel > storage.numel or last >= storage.numel):
        raise Malformed(
            f"a tensor of shape {list(shape)!s:.80} and strides {list(stride)!s:.80} from element "
            f"{start} in a storage of {storage.numel} elements"
        )
    return PickledTensor(storage.storage, storage.dtype, shape, stride, start)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """A contiguous tensor's strides; those of dimensions of size 1, which do not matter, kept."""
    expected, step = [], 1
    for size, given in zip(reversed(shape), reversed(stride), strict=True):
        expected.append(given if size == 1 else step)
        step *= size
    return tuple(reversed(expected))


@dataclass(frozen=True)
class Blob:
    """A byte string of the pickle: where it lies, and its content where that is short."""

    offset: int
    size: int
    content: bytes | None = None


def describe(value: Any) -> str:
    """What a value is, for a message: "a dict", "a torch.nn.modules.linear.Linear"."""
    if isinstance(value, (Record, Reference)):
        kind = value.name
    else:
        kind = "Tensor" if isinstance(value, PickledTensor) else type(value).__name__
    return f"a {kind:.80}"
