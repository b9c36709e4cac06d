"""Which names a checkpoint's pickle may hold, and what each becomes.

Three kinds. Values that are understood (dtypes, storage types). Functions that are understood:
what they would do to tensors, arrays and containers is done here (``REDUCERS``). And classes and
functions of model libraries, which stay names: instances of such classes become records of their
state. Anything else is refused by its name.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from fda_fast.checkpoints.pickles.arrays import PickledArray, PickledDtype, scalar
from fda_fast.checkpoints.pickles.machine import Machine, Reducer, hashable
from fda_fast.checkpoints.pickles.values import (
    MAX_DIMENSIONS,
    Blob,
    Malformed,
    PickledTensor,
    Record,
    Reference,
    Refused,
    StorageType,
    TypedStorage,
    tensor_view,
)

# Where classes of modules, their configurations, transforms and activations live.
_LIBRARIES = (
    "torch.nn.",
    "torch._C._nn.",
    "torchvision.transforms.",
    "open_clip.",
    "clip.",
    "src.",  # Task Arithmetic's code and that of most who build on it
    "timm.",
    "transformers.",
    "sentence_transformers.",
    "peft.",
    "__main__.",
)
# Classes and functions that models refer to beside those.
_NAMES = frozenset(
    f"builtins.{name}"
    for name in (
        *("object", "int", "float", "bool", "str", "bytes", "list", "tuple", "dict", "set"),
        *("frozenset", "complex", "slice", "min", "max"),
    )
) | frozenset(
    (
        "collections.OrderedDict",
        "collections.defaultdict",
        "functools.partial",
        "argparse.Namespace",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "torch.tanh",
        "torch.sigmoid",
        "torch.relu",
        "torch.storage._load_from_bytes",
        "torch.Tensor",
        "torch._tensor.Tensor",
        "numpy.ndarray",
    )
)
_STORED_CLASSES = frozenset(("argparse.Namespace",))
_WORD = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and _WORD.fullmatch(name)
}


def find(module: str, name: str) -> Any:
    """What a global stands for.

    Raises:
        Refused: no checkpoint needs it.
    """
    full = f"{_PYTHON_2.get(module, module)}.{name}"
    if not _WORD.fullmatch(full):
        raise Refused(ascii(full)[:200])
    if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
        return StorageType(_STORAGES[name])
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if full in REDUCERS or full in _NAMES or full.startswith(_LIBRARIES):
        return Reference(full)
    raise Refused(full)


def instantiable(name: str) -> bool:
    """Whether a class of this name may have instances, as records."""
    return name.startswith(_LIBRARIES) or name in _STORED_CLASSES


def _record(name: str) -> Reducer:
    """A call that stays what it is: the name and its arguments."""
    return lambda machine, args: Record(name, args)


def _partial(machine: Machine, args: tuple[Any, ...]) -> Record:
    if len(args) != 1 or not isinstance(args[0], (Reference, Record)):
        raise Malformed("a functools.partial of something else than a function")
    return Record("functools.partial", args)


def _enumeration(name: str) -> Reducer:
    def member(machine: Machine, args: tuple[Any, ...]) -> Record:
        if len(args) != 1 or not isinstance(args[0], (str, int)):
            raise Malformed(f"a member of {name} that is no text or number")
        return Record(name, args)

    return member


def _reconstructor(machine: Machine, args: tuple[Any, ...]) -> Record:
    """copyreg._reconstructor(class, object, None): protocols 0 and 1 of a plain class."""
    kind, base, content = args
    if base != Reference("builtins.object") or content is not None:
        raise Malformed("an instance of a class that extends a built-in type")
    return machine.instance(kind, ())


def _dict(machine: Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    """collections.OrderedDict(), also with the pairs that protocol 2 of Python 2 hands over."""
    (pairs,) = args or ((),)
    if not isinstance(pairs, (list, tuple)):
        raise Malformed("an OrderedDict of something else than pairs")
    machine.budget.spend(len(pairs))
    found = {}
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Malformed("an OrderedDict of something else than pairs")
        found[hashable(pair[0])] = pair[1]
    return found


def _default_dict(machine: Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    if len(args) > 1 or not all(a is None or isinstance(a, Reference) for a in args):
        raise Malformed("a defaultdict of something else than a class")
    return {}


def _set(machine: Machine, args: tuple[Any, ...]) -> set[Any]:
    (items,) = args or ((),)
    if not isinstance(items, (list, tuple)):
        raise Malformed("a set of something else than a list")
    machine.budget.spend(len(items))
    return set(map(hashable, items))


def _encode(machine: Machine, args: tuple[Any, ...]) -> Blob:
    """_codecs.encode(text, "latin1"): how protocol 2 writes byte strings."""
    text, encoding = args
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Malformed("a text in another encoding than latin1")
    machine.budget.spend(text=len(text))
    return Blob(-1, len(text), text.encode("latin-1"))


def _bytes(machine: Machine, args: tuple[Any, ...]) -> Blob:
    if args:
        raise Malformed("bytes made of something")
    return Blob(-1, 0, b"")


def _device(machine: Machine, args: tuple[Any, ...]) -> Record:
    if not all(isinstance(part, (str, int)) for part in args):
        raise Malformed("a device that is no text or number")
    return Record("torch.device", args)


def _size(machine: Machine, args: tuple[Any, ...]) -> tuple[int, ...]:
    (sizes,) = args
    if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_DIMENSIONS:
        raise Malformed("a torch.Size of something else than sizes")
    if not all(type(size) is int for size in sizes):
        raise Malformed("a torch.Size of something else than sizes")
    return tuple(sizes)


def _tensor(machine: Machine, args: tuple[Any, ...]) -> PickledTensor:
    """_rebuild_tensor(storage, offset, size, stride) and _v2(..., requires_grad, hooks, ...)."""
    storage, start, shape, stride, *_ = args
    if not isinstance(storage, TypedStorage):
        raise Malformed("a tensor of something else than a storage")
    return tensor_view(storage, start, shape, stride)


def _tensor_with_dtype(machine: Machine, args: tuple[Any, ...]) -> PickledTensor:
    """_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, ...)."""
    storage, start, shape, stride, _, _, dtype, *_ = args
    if not isinstance(storage, TypedStorage) or not isinstance(dtype, torch.dtype):
        raise Malformed("a tensor of something else than a storage")
    return tensor_view(TypedStorage(storage.storage, dtype), start, shape, stride)


def _parameter(machine: Machine, args: tuple[Any, ...]) -> PickledTensor:
    """_rebuild_parameter(tensor, requires_grad, hooks), also with a state."""
    data = args[0]
    if not isinstance(data, PickledTensor):
        raise Malformed("a parameter of something else than a tensor")
    return PickledTensor(data.storage, data.dtype, data.shape, data.stride, data.start, True)


def _tensor_of_type(machine: Machine, args: tuple[Any, ...]) -> PickledTensor:
    """_rebuild_from_type_v2(function, type, args, state): a tensor with attributes of its own."""
    function, kind, inner, *_ = args
    known = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
    if not isinstance(kind, Reference) or kind.name not in known:
        raise Refused(kind.name) if isinstance(kind, Reference) else Malformed("a tensor's type")
    if not isinstance(function, Reference) or function.name not in _TENSORS:
        raise Malformed("a tensor made by another function than torch's")
    found = machine.call(function, inner)
    assert isinstance(found, PickledTensor)
    return found


def _refuse(kind: str) -> Reducer:
    def refuse(machine: Machine, args: tuple[Any, ...]) -> Any:
        raise Malformed(f"a {kind} tensor")

    return refuse


def _array(machine: Machine, args: tuple[Any, ...]) -> PickledArray:
    """numpy's _reconstruct(ndarray, (0,), b"b"): an empty array, whose state follows."""
    if args[:1] != (Reference("numpy.ndarray"),):
        raise Malformed("an array of another class than numpy.ndarray")
    return PickledArray()


def _array_from_buffer(machine: Machine, args: tuple[Any, ...]) -> PickledArray:
    """numpy's _frombuffer(bytes, dtype, shape, "C" | "F"): protocol 5."""
    data, dtype, shape, order = args
    if order not in ("C", "F"):
        raise Malformed("an array in an unknown order")
    array = PickledArray()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


def _dtype(machine: Machine, args: tuple[Any, ...]) -> PickledDtype:
    return PickledDtype.of(args[0])


def _scalar(machine: Machine, args: tuple[Any, ...]) -> int | float | bool:
    return scalar(*args)


_TENSORS: dict[str, Reducer] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
REDUCERS: dict[str, Reducer] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch._utils._rebuild_sparse_tensor": _refuse("sparse"),
    "torch._utils._rebuild_qtensor": _refuse("quantised"),
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _record("torch.layout"),
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": _set,
    "builtins.frozenset": lambda machine, args: frozenset(_set(machine, args)),
    "builtins.bytes": _bytes,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "functools.partial": _partial,
    "pathlib.PosixPath": _record("pathlib.PosixPath"),
    "pathlib.WindowsPath": _record("pathlib.WindowsPath"),
    "pathlib._local.PosixPath": _record("pathlib.PosixPath"),
    "pathlib._local.WindowsPath": _record("pathlib.WindowsPath"),
    "torchvision.transforms.functional.InterpolationMode": _enumeration(
        "torchvision.transforms.functional.InterpolationMode"
    ),
    "numpy.dtype": _dtype,
    **{
        f"numpy.{package}.{name}": reducer
        for package in ("core", "_core")
        for name, reducer in (
            ("multiarray._reconstruct", _array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _array_from_buffer),
        )
    },
}
