"""The header of a safetensors file, checked against the file before anything is believed."""

from __future__ import annotations

import json
from typing import Any

import torch

from fda_fast.checkpoints.tensorfile import TensorFile, TensorInfo, check_readable
from fda_fast.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's own limit; a larger one is corruption or an attack.
_MAX_HEADER = 100_000_000
_MAX_NAME = 1024


def read_header(file: TensorFile) -> dict[str, TensorInfo]:
    """Names, shapes, dtypes and positions of every tensor of a safetensors file.

    Returns:
        {name: TensorInfo} in the order of the bytes in the file.

    Raises:
        InputError: header length, JSON, names, shapes, dtypes or offsets that do not fit the file;
            overlapping, missing or trailing bytes.

    Cost: reads the header alone.
    """
    prefix = file.read_bytes(0, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_MAX_HEADER, file.size - 8):
        raise _corrupt(
            file, f"a header of at most {max(0, file.size - 8)} bytes", f"{length} bytes"
        )
    header = _parse(file, file.read_bytes(8, length))
    start = 8 + length
    infos = {
        name: _tensor_info(file, name, entry, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_coverage(file, ordered, start)
    return ordered


def parse_json(text: bytes, what: str, *, unique: bool = False) -> Any:
    """JSON of a file that may hold anything.

    Args:
        text: the bytes.
        what: the file, for the message.
        unique: refuse an object that names a key twice.

    Raises:
        InputError: not UTF-8, not JSON, nested beyond reason, or a key twice.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if unique and len(result) != len(items):
            twice = next(key for i, (key, _) in enumerate(items) if key in dict(items[:i]))
            raise InputError(f"{what} names {twice!r} twice")
        return result

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not valid JSON", got=str(error)[:200]) from error


def _parse(file: TensorFile, text: bytes) -> dict[str, Any]:
    header = parse_json(text, f"the header of {file.path} of the {file.role}", unique=True)
    if not isinstance(header, dict):
        raise _corrupt(file, "a JSON object as header", type(header).__name__)
    return header


def _tensor_info(file: TensorFile, name: str, entry: Any, start: int) -> TensorInfo:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _corrupt(file, f"printable tensor names of 1 to {_MAX_NAME} characters", repr(name))
    if not isinstance(entry, dict):
        raise _corrupt(file, f"an object for tensor {name!r}", repr(entry)[:80])
    dtype_name = entry.get("dtype")
    if not isinstance(dtype_name, str) or not dtype_name.isprintable():
        raise _corrupt(file, f"a dtype for tensor {name!r}", repr(dtype_name)[:80])
    dtype = DTYPES.get(dtype_name)
    check_readable(name, dtype, dtype_name[:40], file.role)
    assert dtype is not None
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None:
        raise _corrupt(file, f"a shape for tensor {name!r}", repr(entry.get("shape"))[:80])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        got = repr(entry.get("data_offsets"))[:80]
        raise _corrupt(file, f"two offsets for tensor {name!r}", got)
    begin, end = offsets
    numel = 1
    for size in shape:
        numel *= size
    if numel * dtype.itemsize != end - begin:
        raise _corrupt(
            file, f"{numel * dtype.itemsize} bytes for tensor {name!r}", f"{end - begin} bytes"
        )
    if start + end > file.size:
        raise InputError(
            f"file {file.path} of the {file.role} is truncated",
            expected=f"at least {start + end} bytes (tensor {name!r})",
            got=f"{file.size} bytes",
            fix="Download or copy it again",
        )
    return TensorInfo(shape, dtype, file.path, end - begin, start + begin)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Whole numbers from 0 whose product fits 62 bits even with the zeros left out, or None."""
    if not isinstance(value, list) or len(value) > 64:
        return None
    product = 1
    for size in value:
        # bool is an int to isinstance; the format has no use for it.
        if type(size) is not int or size < 0:
            return None
        product *= max(size, 1)
        if product >= 1 << 62:
            return None
    return tuple(value)


def _check_coverage(file: TensorFile, infos: dict[str, TensorInfo], start: int) -> None:
    position = start
    for name, info in infos.items():
        if info.offset != position:
            raise _corrupt(
                file, f"tensor {name!r} at byte {position}", f"byte {info.offset} (hole or overlap)"
            )
        position += info.nbytes
    if position != file.size:
        raise _corrupt(file, f"{position} bytes", f"{file.size} bytes")


def _corrupt(file: TensorFile, expected: str, got: str) -> InputError:
    return InputError(
        f"file {file.path} of the {file.role} is not an intact safetensors file",
        expected=expected,
        got=got,
        fix="Download or copy it again",
    )
