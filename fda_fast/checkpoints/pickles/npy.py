"""``.npy`` files, those with pickled objects included: published anchors of language models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fda_fast.checkpoints.pickles.arrays import (
    PickledArray,
    PickledDtype,
    array_of,
    count_of,
)
from fda_fast.checkpoints.pickles.containers import load_at
from fda_fast.checkpoints.pickles.load import explained
from fda_fast.checkpoints.pickles.values import Malformed, PickledTensor, describe
from fda_fast.checkpoints.tensorfile import TensorFile, check_readable

_MAGIC = b"\x93NUMPY"
# As numpy writes it; evaluating it as Python, as numpy does to read it, is not needed.
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]\w{1,3})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}, ?)*\d{0,19})\), \}\s*"
)
_MAX_HEADER = 10_000
_MAX_DEPTH = 20
_MAX_PARTS = 100_000


def read_npy(path: str | Path, role: str = "anchors") -> Any:
    """What ``np.save`` wrote: an array of numbers, or the object pickled in place of one.

    Args:
        path: the file.
        role: whose file it is, for messages.

    Returns:
        ``np.ndarray``; or, where an object was saved, that object: for a dict
        ``{"input": array, "gt": array, "attention_mask": array}``. Arrays inside dicts, lists and
        tuples, also torch tensors that torch pickled, are arrays of numbers in memory of their own.

    Raises:
        InputError: damaged, or its pickle names code.

    Cost: the file is read once. Nothing is executed: see ``load_pickle``.
    """
    file = TensorFile(Path(path), role)
    with explained(file):
        descr, fortran, shape, begin = _read_header(file)
        if descr == "|O":
            found = load_at(file, begin)
            if not isinstance(found, PickledArray) or found.shape != shape:
                raise Malformed("an array of objects that its header does not describe")
            return _Reader(file).real(found.item())
        return _read_numbers(file, descr, fortran, shape, begin)


def _read_header(file: TensorFile) -> tuple[str, bool, tuple[int, ...], int]:
    """(dtype, column by column, shape, position of the data)."""
    head = file.read_bytes(0, 12)
    if head[:6] != _MAGIC or len(head) < 12 or head[6] not in (1, 2, 3):
        raise Malformed("no .npy header")
    wide = head[6] > 1
    length = int.from_bytes(head[8:12] if wide else head[8:10], "little")
    start = 12 if wide else 10
    if length > _MAX_HEADER or start + length > file.size:
        raise Malformed(f"a header of {length} bytes")
    found = _HEADER.fullmatch(file.read_bytes(start, length))
    if found is None:
        raise Malformed("a header other than numpy's for an array without fields")
    descr, fortran, sizes = (group.decode("ascii") for group in found.groups())
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    return descr, fortran == "True", shape, start + length


def _read_numbers(
    file: TensorFile, descr: str, fortran: bool, shape: tuple[int, ...], begin: int
) -> np.ndarray[Any, Any]:
    kind = PickledDtype.of(descr[1:])
    kind.set_state((3, descr[:1], None, None, None))
    nbytes = count_of(shape) * kind.numpy().itemsize
    if begin + nbytes != file.size:
        raise Malformed(f"{file.size - begin} bytes for an array of {nbytes}")
    return array_of(file.read_bytes(begin, nbytes), kind, shape, fortran)


class _Reader:
    """Replaces descriptions of arrays by the arrays, each read once however often it is named."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._arrays: dict[int, np.ndarray[Any, Any]] = {}
        self._left = _MAX_PARTS

    def real(self, value: Any, depth: int = 0) -> Any:
        """The value with arrays in it."""
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise Malformed("containers nested beyond reason")
        if isinstance(value, dict):
            return {key: self.real(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.real(entry, depth + 1) for entry in value)
        if isinstance(value, (PickledArray, PickledTensor)):
            if id(value) not in self._arrays:
                self._arrays[id(value)] = self._read(value)
            return self._arrays[id(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise Malformed(f"{describe(value)} in an array of objects")

    def _read(self, value: PickledArray | PickledTensor) -> np.ndarray[Any, Any]:
        if isinstance(value, PickledArray):
            return value.read(self._file)
        info = value.info(self._file)
        check_readable("of an array", info.dtype, str(info.dtype), self._file.role)
        tensor = self._file.read([info])[0]
        if tensor.dtype == torch.bfloat16:  # numpy has none
            tensor = tensor.float()
        return tensor.numpy()
