"""One weight file on disk: where each tensor lies, and reading it without mapping the file.

Files are read into memory of our own rather than mapped: a mapped file that is truncated while a
merge runs kills the process (SIGBUS), a read one gives an error.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fda_fast.errors import InputError

# dtypes that weights and buffers may have. Everything else is refused by name.
READABLE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
# One read moves at most 2 GiB on Linux whatever is asked.
_CHUNK = 1 << 30
_QUANTISED_NAMES = ("qweight", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "weight_packed")


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor, known without reading it.

    Attributes:
        shape: sizes, () for a scalar.
        dtype: as stored.
        file: the file that holds the bytes.
        nbytes: numel * itemsize.
        offset: position of the first byte in ``file``.
        stride: in elements, where a pickled tensor is not contiguous; None when it is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    nbytes: int
    offset: int = 0
    stride: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes // self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes from the first to the last element in the file, strides included."""
        if self.stride is None or self.nbytes == 0:
            return self.nbytes
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


def check_readable(name: str, dtype: torch.dtype | None, dtype_name: str, role: str) -> None:
    """Refuse a tensor whose dtype holds quantised weights or is unknown.

    Args:
        name: the tensor.
        dtype: its torch dtype, None where torch has none.
        dtype_name: the dtype as the file writes it.
        role: whose file it is, for the message.

    Raises:
        InputError: names the tensor and its dtype.
    """
    leaf = name.rsplit(".", 1)[-1]
    quantised = leaf in _QUANTISED_NAMES or (
        dtype in (torch.int8, torch.uint8) and leaf.endswith(("weight", "kernel"))
    )
    if dtype is not None and dtype in READABLE and not quantised:
        return
    raise InputError(
        f"dtype of tensor {name!r} of the {role}",
        expected="float32, bfloat16, float16 or float64 weights",
        got=f"{dtype_name} (quantised weights)" if quantised else dtype_name,
        fix="Merging needs unquantised weights: use the checkpoint this one was quantised from, "
        "or dequantise it first",
    )


class TensorFile:
    """A regular file whose size and modification time must stay what they were at opening.

    Args:
        path: the file; symbolic links are followed.
        role: whose file it is ("base model", "expert movie"), for the messages.

    Raises:
        InputError: the file is missing, not a regular file, or cannot be opened.
    """

    def __init__(self, path: Path, role: str) -> None:
        self.path, self.role = path, role
        try:
            found = os.stat(path)
        except OSError as error:
            raise InputError(f"file {path} of the {role}", got=error.strerror) from error
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"file {path} of the {role}", expected="a regular file")
        self.size = found.st_size
        self._stamp = _stamp(found)

    def read_bytes(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``; fewer only at the end of the file."""
        with self._open() as stream:
            stream.seek(offset)
            return stream.read(count)

    def read(self, infos: Iterable[TensorInfo]) -> list[torch.Tensor]:
        """The tensors, each in memory of its own, contiguous, in the stored dtype.

        Raises:
            InputError: the file changed since it was opened, or ends early.

        Cost: every byte of the tensors is read once; one open and two stats per call.
        """
        with self._open() as stream:
            return [self._read_one(stream, info) for info in infos]

    def _read_one(self, stream: io.FileIO, info: TensorInfo) -> torch.Tensor:
        if info.span == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        buffer = torch.empty(info.span, dtype=torch.uint8)
        view = buffer.numpy().data
        stream.seek(info.offset)
        done = 0
        while done < info.span:
            got = stream.readinto(view[done : done + _CHUNK])
            if not got:
                raise self._changed("it ends before the tensor does")
            done += got
        flat = buffer.view(info.dtype)
        if info.stride is None:
            return flat.reshape(info.shape)
        return flat.as_strided(info.shape, info.stride).contiguous()

    @contextmanager
    def _open(self) -> Iterator[io.FileIO]:
        """The file opened for reading, checked against the stamp before and after its use."""
        try:
            stream = io.FileIO(self.path, "r")
        except OSError as error:
            raise InputError(
                f"file {self.path} of the {self.role} cannot be read", got=error.strerror
            ) from error
        with stream:
            self._check(stream)
            yield stream
            self._check(stream)

    def _check(self, stream: io.FileIO) -> None:
        if _stamp(os.fstat(stream.fileno())) != self._stamp:
            raise self._changed("another size, time or file than at the start")

    def _changed(self, how: str) -> InputError:
        return InputError(
            f"file {self.path} of the {self.role} changed while it was being used",
            got=how,
            fix="Leave the inputs alone until the merge is done, then run it again",
        )


def _stamp(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
