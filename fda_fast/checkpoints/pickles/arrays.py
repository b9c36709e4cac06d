"""numpy arrays in pickles: their bytes lie in the pickle itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fda_fast.checkpoints.pickles.values import Blob, Malformed
from fda_fast.checkpoints.tensorfile import TensorFile

_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_OBJECT = "O"
# numpy's own limit before version 2.
_MAX_DIMENSIONS = 32


@dataclass(eq=False)
class PickledDtype:
    """A numpy dtype: of numbers, or ``object``.

    Attributes:
        code: "f4", "i8", "O".
        order: "<" or ">".
    """

    code: str
    order: str = "<"

    @classmethod
    def of(cls, code: Any) -> PickledDtype:
        """The dtype that numpy writes as ``code``; Malformed for text, dates and records."""
        if code in (_OBJECT, "O8"):
            return cls(_OBJECT)
        if code not in _NUMBERS:
            raise Malformed(f"a numpy dtype {code!r:.40}")
        return cls(code)

    def set_state(self, state: Any) -> None:
        """Take over the byte order of what ``numpy.dtype.__reduce__`` gives."""
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise Malformed("a numpy dtype with fields")
        self.order = "<" if order in ("=", "|") else order

    def numpy(self) -> np.dtype[Any]:
        """As numpy has it; Malformed for ``object``."""
        if self.code == _OBJECT:
            raise Malformed("a numpy array of Python objects")
        return np.dtype(self.order + self.code)


@dataclass(eq=False)
class PickledArray:
    """A numpy array: bytes of the file, or a list of objects.

    Attributes:
        dtype: of the elements; None before the pickle gives the array's state.
        shape: sizes.
        fortran: whether its elements are stored column by column.
        data: where its bytes are, or its elements if they are Python objects.
    """

    dtype: PickledDtype | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False
    data: Blob | list[Any] | None = None

    def __repr__(self) -> str:
        return f"<array {list(self.shape)}>"

    def set_state(self, state: Any) -> None:
        """Take over what ``numpy.ndarray.__reduce__`` gives; Malformed if it does not fit."""
        if self.dtype is not None:
            raise Malformed("a second state for an array")
        _, shape, dtype, fortran, data = state
        count = count_of(shape)
        if not isinstance(dtype, PickledDtype) or not isinstance(fortran, (bool, int)):
            raise Malformed("an array without a dtype")
        if dtype.code == _OBJECT:
            fits = isinstance(data, list) and len(data) == count
        else:
            fits = isinstance(data, Blob) and data.size == count * dtype.numpy().itemsize
        if not fits:
            raise Malformed(f"an array of shape {shape!r:.80} with data of another size")
        self.dtype, self.shape, self.fortran, self.data = dtype, shape, bool(fortran), data

    def read(self, file: TensorFile) -> np.ndarray[Any, Any]:
        """The array of numbers, in memory of its own, in this machine's byte order.

        Raises:
            Malformed: it holds Python objects.
            InputError: the file changed.
        """
        if self.dtype is None or not isinstance(self.data, Blob):
            raise Malformed("a numpy array of Python objects")
        content = self.data.content
        if content is None:
            content = file.read_bytes(self.data.offset, self.data.size)
        if len(content) != self.data.size:
            raise Malformed("a numpy array beyond the end of the file")
        return array_of(content, self.dtype, self.shape, self.fortran)

    def item(self) -> Any:
        """The one object of an array of shape (): a dict that ``np.save`` was given."""
        if self.shape != () or not isinstance(self.data, list):
            raise Malformed(f"an array of shape {list(self.shape)!s:.80}")
        return self.data[0]


def count_of(shape: Any) -> int:
    """Number of elements of an array of this shape; Malformed if it is none."""
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
        raise Malformed("an array without a shape")
    sizes_fit = all(type(size) is int and size >= 0 for size in shape)
    if not sizes_fit or math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise Malformed(f"an array of shape {shape!r:.80}")
    return math.prod(shape)


def array_of(
    content: bytes, dtype: PickledDtype, shape: tuple[int, ...], fortran: bool
) -> np.ndarray[Any, Any]:
    """The array of these bytes, in memory of its own, in this machine's byte order."""
    kind = dtype.numpy()
    flat = np.frombuffer(content, kind).astype(kind.newbyteorder("="))
    return flat.reshape(shape, order="F" if fortran else "C")


def scalar(dtype: Any, data: Any) -> int | float | bool:
    """The number numpy pickles as a dtype and its bytes."""
    if not isinstance(dtype, PickledDtype) or not isinstance(data, Blob):
        raise Malformed("a numpy number without dtype and bytes")
    kind = dtype.numpy()
    if data.content is None or data.size != kind.itemsize:
        raise Malformed("a numpy number of another size than its dtype")
    number: int | float | bool = np.frombuffer(data.content, kind)[0].item()
    return number
