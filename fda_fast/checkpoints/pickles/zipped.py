"""The directory of a zip file as torch.save writes it: members uncompressed, one after the other.

Read here rather than by ``zipfile``, which accepts far more than that: compressed members,
two of a name, members that overlap, and as many of them as fill the memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fda_fast.checkpoints.pickles.values import Malformed
from fda_fast.checkpoints.tensorfile import TensorFile

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END_64, _LOCATOR_64 = b"PK\x06\x06", b"PK\x06\x07"
_END_SIZE, _END_64_SIZE, _LOCATOR_SIZE = 22, 56, 20
_LOCAL_SIZE, _CENTRAL_SIZE = 30, 46
_SATURATED = 0xFFFFFFFF
_ENCRYPTED = 1
_ZIP_64_EXTRA = 1
# A member takes 60 to 130 bytes here: enough for 100,000 tensors.
_MAX_DIRECTORY = 16_000_000


@dataclass(frozen=True)
class Member:
    """Where one member lies in the file: its header, and its bytes."""

    header: int
    offset: int
    size: int


def read_members(file: TensorFile) -> dict[str, Member]:
    """{name: where it lies}.

    Raises:
        Malformed: damaged, or not of the kind that torch.save writes.

    Cost: reads the directory at the end and 30 bytes at each member.
    """
    begin, size, count = _find_directory(file)
    directory = file.read_bytes(begin, size)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        name, header, size, position = _read_entry(directory, position)
        if name in members:
            raise Malformed(f"two members named {name!r:.80}")
        members[name] = _locate(file, name, header, size, begin)
    if position != len(directory):
        raise Malformed("a zip directory of another size than its entries")
    _check_overlap(members)
    return members


def _find_directory(file: TensorFile) -> tuple[int, int, int]:
    """(position, size, number of entries) of the directory."""
    tail = file.size - _END_SIZE
    end = file.read_bytes(max(tail, 0), _END_SIZE)
    if len(end) < _END_SIZE or end[:4] != _END:
        raise Malformed("no zip directory at its end: it is cut off")
    disk, first_disk, here, count, size, begin, comment = struct.unpack("<4H2IH", end[4:])
    locator = file.read_bytes(max(tail - _LOCATOR_SIZE, 0), _LOCATOR_SIZE)
    if locator[:4] == _LOCATOR_64 and len(locator) == _LOCATOR_SIZE:
        tail = struct.unpack("<IQI", locator[4:])[1]
        end = file.read_bytes(tail, _END_64_SIZE) if tail < file.size else b""
        if len(end) < _END_64_SIZE or end[:4] != _END_64:
            raise Malformed("a broken zip directory")
        disk, first_disk, here, count, size, begin = struct.unpack("<2I4Q", end[16:])
    if disk or first_disk or here != count or comment:
        raise Malformed("a zip of several parts or with a comment")
    if size > _MAX_DIRECTORY or begin + size > tail or count * _CENTRAL_SIZE > size:
        raise Malformed("a broken zip directory")
    return begin, size, count


def _read_entry(directory: bytes, position: int) -> tuple[str, int, int, int]:
    """(name, position of its header, size, position of the next entry)."""
    fixed = directory[position : position + _CENTRAL_SIZE]
    if len(fixed) < _CENTRAL_SIZE or fixed[:4] != _CENTRAL:
        raise Malformed("a broken zip directory")
    flags, method = struct.unpack("<2H", fixed[8:12])
    packed, size, n_name, n_extra, n_comment = struct.unpack("<2I3H", fixed[20:34])
    header = struct.unpack("<I", fixed[42:46])[0]
    position += _CENTRAL_SIZE
    name = _decode(directory[position : position + n_name])
    extra = directory[position + n_name : position + n_name + n_extra]
    size, packed, header = _widen(extra, size, packed, header)
    if method or packed != size:
        raise Malformed(f"member {name!r:.80} is compressed")
    if flags & _ENCRYPTED:
        raise Malformed(f"member {name!r:.80} is encrypted")
    return name, header, size, position + n_name + n_extra + n_comment


def _widen(extra: bytes, *fields: int) -> list[int]:
    """The fields, those too large for 32 bits taken from the zip64 part of ``extra``."""
    if _SATURATED not in fields:
        return list(fields)
    while len(extra) >= 4:
        kind, length = struct.unpack("<2H", extra[:4])
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == _ZIP_64_EXTRA:
            wide = iter(struct.unpack(f"<{len(content) // 8}Q", content[: len(content) // 8 * 8]))
            return [next(wide, f) if f == _SATURATED else f for f in fields]
    return list(fields)


def _locate(file: TensorFile, name: str, header: int, size: int, limit: int) -> Member:
    """The member behind its own header, which must agree with the directory."""
    local = file.read_bytes(header, _LOCAL_SIZE) if header < limit else b""
    if len(local) < _LOCAL_SIZE or local[:4] != _LOCAL:
        raise Malformed(f"member {name!r:.80} is not where the directory says")
    method = struct.unpack("<H", local[8:10])[0]
    n_name, n_extra = struct.unpack("<2H", local[26:30])
    if method or _decode(file.read_bytes(header + _LOCAL_SIZE, n_name)) != name:
        raise Malformed(f"member {name!r:.80} has another name or is compressed")
    offset = header + _LOCAL_SIZE + n_name + n_extra
    if offset + size > limit:
        raise Malformed(f"member {name!r:.80} beyond the zip's data")
    return Member(header, offset, size)


def _check_overlap(members: dict[str, Member]) -> None:
    end = 0
    for name, member in sorted(members.items(), key=lambda item: item[1].offset):
        if member.header < end:
            raise Malformed(f"member {name!r:.80} overlaps another")
        end = member.offset + member.size


def _decode(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("a member whose name is no text") from error
