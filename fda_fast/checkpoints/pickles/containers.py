"""The three ways torch and Python wrap a pickle and the storages its tensors are views of.

- zip: ``torch.save`` since 1.6. The pickle is one member, every storage another.
- raw: ``torch.save`` before: five pickles (magic number, version, byte order, the object, the
  storages' keys), then the storages, each behind its number of elements.
- plain: ``pickle.dump``: every storage is a raw file of its own, in a byte string of the pickle.

In all three a storage is a run of bytes of the file, so tensors are read lazily from all three.
"""

from __future__ import annotations

from typing import Any

import torch

from fda_fast.checkpoints.pickles import allowed
from fda_fast.checkpoints.pickles.machine import Machine, Persistent
from fda_fast.checkpoints.pickles.source import Budget, Source
from fda_fast.checkpoints.pickles.values import (
    Blob,
    Malformed,
    Reference,
    Storage,
    StorageType,
    TypedStorage,
    describe,
)
from fda_fast.checkpoints.pickles.zipped import Member, read_members
from fda_fast.checkpoints.tensorfile import TensorFile

ZIP_MAGIC = b"PK\x03\x04"
_RAW_MAGIC = 0x1950A86A20F9469CFC6C
RAW_PREFIX = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_RAW_VERSION = 1001
_TAR_OFFSET, _TAR_MAGIC = 257, b"ustar"
_MAX_NESTING = 1


def load(file: TensorFile) -> Any:
    """The object in a file of any of the three kinds.

    Raises:
        Malformed: damaged, or not such a file.
        Refused: its pickle names code.
    """
    first = file.read_bytes(0, _TAR_OFFSET + len(_TAR_MAGIC))
    if first.startswith(ZIP_MAGIC):
        return _load_zip(file)
    if first[_TAR_OFFSET:] == _TAR_MAGIC:
        raise Malformed("the tar format of torch before 0.1.13: save it again with a newer one")
    source, budget = Source(file, 0, file.size), Budget()
    if first.startswith(RAW_PREFIX):
        return _load_raw(source, budget)
    return _machine(source, budget, None).load()


def load_at(file: TensorFile, begin: int) -> Any:
    """The object of the plain pickle that starts at ``begin``; as ``load`` otherwise."""
    return _machine(Source(file, begin, file.size), Budget(), None).load()


def _machine(
    source: Source, budget: Budget, persistent: Persistent | None, nesting: int = 0
) -> Machine:
    def nested(machine: Machine, args: tuple[Any, ...]) -> Any:
        """torch.storage._load_from_bytes: a storage in a raw file of its own."""
        (blob,) = args
        if not isinstance(blob, Blob) or nesting >= _MAX_NESTING:
            raise Malformed("a storage that is no byte string")
        if blob.offset < 0:
            raise Malformed("tensors pickled in protocol 2 without torch.save")
        inner = Source(source.file, blob.offset, blob.offset + blob.size)
        found = _load_raw(inner, budget, nesting + 1)
        if not isinstance(found, TypedStorage):
            raise Malformed(f"{describe(found)} where a storage belongs")
        return found

    reducers = allowed.REDUCERS | {"torch.storage._load_from_bytes": nested}
    return Machine(source, budget, allowed.find, reducers, allowed.instantiable, persistent)


def _load_zip(file: TensorFile) -> Any:
    members = read_members(file)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Malformed(f"a zip with {len(pickles)} members named data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise Malformed("a TorchScript program, not a checkpoint")
    order = members.get(f"{root}byteorder")
    if order is not None and file.read_bytes(order.offset, min(order.size, 16)) != b"little":
        raise Malformed("big-endian numbers")
    member = members[pickles[0]]
    source = Source(file, member.offset, member.offset + member.size)
    return _machine(source, Budget(), _Members(members, f"{root}data/")).load()


class _Members:
    """Persistent ids of the zip format: ("storage", type, key, device, elements)."""

    def __init__(self, members: dict[str, Member], prefix: str) -> None:
        self._members, self._prefix = members, prefix
        self._found: dict[str, Storage] = {}

    def __call__(self, identifier: Any) -> TypedStorage:
        key, dtype, numel = _storage_id(identifier, 5)
        member = self._members.get(self._prefix + key)
        if member is None:
            raise Malformed(f"storage {key!r:.40} is not in the file")
        if numel * dtype.itemsize != member.size:
            raise Malformed(
                f"storage {key!r:.40} of {numel} elements of {str(dtype)[6:]} in "
                f"{member.size} bytes"
            )
        storage = self._found.setdefault(key, Storage(key, member.size, member.offset))
        return TypedStorage(storage, dtype)


def _load_raw(source: Source, budget: Budget, nesting: int = 0) -> Any:
    head = _machine(source, budget, None)
    if head.load() != _RAW_MAGIC or head.load() != _RAW_VERSION:
        raise Malformed("an unknown version of torch's format before 1.6")
    system = head.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Malformed("big-endian numbers")
    storages = _RawStorages()
    found = _machine(source, budget, storages, nesting).load()
    keys = head.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Malformed("a list of storages that is none")
    storages.place(source, keys)
    return found


class _RawStorages:
    """Persistent ids of the raw format: storages, views of them, and sources of modules."""

    def __init__(self) -> None:
        self._roots: dict[str, tuple[Storage, torch.dtype]] = {}
        self._views: dict[str, Storage] = {}

    def __call__(self, identifier: Any) -> TypedStorage | Reference:
        if isinstance(identifier, tuple) and identifier[:1] == ("module",):
            # ("module", class, file name, source text): the text was for a warning only.
            if len(identifier) != 4 or not isinstance(identifier[1], Reference):
                raise Malformed("a module's source without its class")
            return identifier[1]
        view = identifier[5] if isinstance(identifier, tuple) and len(identifier) == 6 else None
        key, dtype, numel = _storage_id(identifier, 6)
        nbytes = numel * dtype.itemsize
        root, known = self._roots.setdefault(key, (Storage(key, nbytes), dtype))
        if root.nbytes != nbytes or known != dtype:
            raise Malformed(f"two sizes of storage {key!r:.40}")
        return TypedStorage(root if view is None else self._view(root, dtype, view), dtype)

    def _view(self, root: Storage, dtype: torch.dtype, view: Any) -> Storage:
        """(key, offset, size) in elements: part of a storage."""
        key, offset, size = view
        if type(offset) is not int or type(size) is not int or min(offset, size) < 0:
            raise Malformed("a view of a storage that is no range")
        if (offset + size) * dtype.itemsize > root.nbytes:
            raise Malformed(f"a view beyond storage {root.key!r:.40}")
        part = Storage(str(key)[:40], size * dtype.itemsize, None, root, offset * dtype.itemsize)
        return self._views.setdefault(part.key, part)

    def place(self, source: Source, keys: list[str]) -> None:
        """Find the storages behind the pickles, in the order of ``keys``."""
        for key in keys:
            if key not in self._roots:
                raise Malformed(f"storage {key!r:.40}, which no tensor uses")
            storage, dtype = self._roots[key]
            numel = int.from_bytes(source.take(8), "little", signed=True)
            if numel * dtype.itemsize != storage.nbytes or storage.offset is not None:
                raise Malformed(f"storage {key!r:.40} of another size than the pickle says")
            storage.offset = source.skip(storage.nbytes)
        missing = [key for key, (s, _) in self._roots.items() if s.offset is None]
        if missing:
            raise Malformed(f"storage {missing[0]!r:.40} is not in the file")


def _storage_id(identifier: Any, length: int) -> tuple[str, torch.dtype, int]:
    """(key, dtype, number of elements) of a persistent id."""
    if not isinstance(identifier, tuple) or len(identifier) != length:
        raise Malformed(f"a reference to {describe(identifier)} outside the pickle")
    kind, storage_type, key, _, numel = identifier[:5]
    if kind != "storage" or not isinstance(storage_type, StorageType):
        raise Malformed("a reference to something else than a storage outside the pickle")
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 62:
        raise Malformed("a storage without key or size")
    return key, storage_type.dtype, numel
