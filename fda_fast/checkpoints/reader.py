"""A checkpoint of any accepted form, opened without reading weights and read tensor by tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fda_fast.checkpoints import directory, legacy
from fda_fast.checkpoints.headers import read_header
from fda_fast.checkpoints.pickles import Record
from fda_fast.checkpoints.pickles.config import config_of
from fda_fast.checkpoints.tensorfile import TensorFile, TensorInfo
from fda_fast.errors import InputError, with_path

# How many names a message or a note lists before it says how many more there are.
SHOWN = 5


def some(names: Iterable[str]) -> str:
    """Up to five names, and how many there are beyond those."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


class Checkpoint:
    """An opened checkpoint: names, shapes and dtypes at once, tensors when asked for.

    Use ``Checkpoint.open``. No file stays open or mapped between reads.

    Attributes:
        path: as given.
        directory: where config.json and tokenizer of a Hugging Face or PEFT checkpoint are; None
            for a single file.
        role: "base model", "expert movie": how messages call it.
        names: {tensor name: TensorInfo}, in the order of the files.
        config: config.json as a dict, or what a pickled model of transformers says in its place;
            None where there is neither.
        adapter: adapter_config.json of a PEFT directory as a dict, None for a model.
        notes: what was found and accepted, one sentence each, without paths: reports hold them.
        modules: {file: the pickled module} of files that hold one rather than a state dict.
        aliases: {name: the first name with the same bytes}: tied weights of a pickle.
    """

    def __init__(self, path: Path, role: str, contents: directory.Contents) -> None:
        self.path, self.role = path, role
        self.directory = contents.beside
        self.config: dict[str, Any] | None = contents.config
        self.adapter: dict[str, Any] | None = contents.adapter
        self.notes: list[str] = []
        self._files: dict[Path, TensorFile] = {}
        self.modules: dict[Path, Record] = {}
        names: dict[str, TensorInfo] = {}
        for file in contents.files:
            found = self._open_file(file)
            if file in contents.modules:
                prefix = contents.modules[file]
                found = {f"{prefix}.{name}": info for name, info in found.items()}
            twice = sorted(found.keys() & names.keys())
            if twice:
                raise InputError(
                    f"tensor {twice[0]!r} of the {role} is in two files",
                    got=f"{names[twice[0]].file} and {file}",
                    fix="Remove the stale shard, or save the checkpoint again",
                )
            names |= found
        if contents.weight_map is not None:
            names = self._apply_index(names, contents.weight_map)
        if self.config is None and len(self.modules) == 1:
            self.config = config_of(next(iter(self.modules.values())))
        if not names:
            raise InputError(
                f"the {with_path(role, path)} is empty", expected="tensors", got="none"
            )
        self.names: Mapping[str, TensorInfo] = MappingProxyType(names)
        self.aliases = self._find_aliases()

    @classmethod
    def open(cls, path: str | Path, role: str = "base model") -> Checkpoint:
        """Open a checkpoint and check everything that can be checked without reading weights.

        Args:
            path: a Hugging Face model directory (single file or shards, safetensors or pickled
                state dict), a PEFT adapter directory, a folder of pickled modules with
                model_index.json, or a .safetensors, .bin, .pt, .pth file: a state dict or a
                whole pickled module.
            role: whose checkpoint it is, for messages: "base model", "expert movie".

        Raises:
            InputError: missing, damaged, truncated, quantised or dangerous; the message names the
                file or tensor, what was expected, what was found and what to do.

        Cost: reads headers, indices, config.json and the pickles without their tensors.
        """
        path = Path(path).expanduser()
        return cls(path, role, directory.find(path, role))

    def read(
        self, names: Iterable[str], at_hand: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors by name, in the stored dtype, contiguous, on the CPU, in the order asked for.

        Args:
            names: names of this checkpoint.
            at_hand: tensors the caller has already, by name: given back as they are, not read.

        Raises:
            InputError: a name the checkpoint lacks, or a file that changed since it was opened.

        Cost: each byte of these tensors is read once; nothing is kept.
        """
        wanted = list(names)
        found = {name: at_hand[name] for name in wanted if name in at_hand} if at_hand else {}
        by_file: defaultdict[Path, list[str]] = defaultdict(list)
        for name in wanted:
            if name in found:
                continue
            if name not in self.names:
                raise InputError(f"the {with_path(self.role, self.path)} has no tensor {name!r}")
            by_file[self.names[name].file].append(name)
        for path, group in by_file.items():
            group.sort(key=lambda name: self.names[name].offset)
            tensors = self._files[path].read(self.names[name] for name in group)
            found |= dict(zip(group, tensors, strict=True))
        return {name: found[name] for name in wanted}

    def close(self) -> None:
        """Drop what is kept in memory: the records of pickled modules."""
        self.modules.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.names.values())

    def _open_file(self, path: Path) -> dict[str, TensorInfo]:
        file = self._files[path] = TensorFile(path, self.role)
        first = file.read_bytes(0, 64)
        kind = legacy.file_kind(path, first)
        if kind == "safetensors":
            return read_header(file)
        if kind != "pickle":
            raise InputError(
                f"file {path} of the {self.role}",
                expected="a safetensors file or a pickled state dict",
                got=kind,
            )
        infos, module = legacy.read_pickle(file)
        if module is not None:
            self.modules[path] = module
        return infos

    def _apply_index(
        self, names: dict[str, TensorInfo], weight_map: dict[str, Path]
    ) -> dict[str, TensorInfo]:
        """Keep what the index lists, and hold it against what the shards contain."""
        for name, file in weight_map.items():
            if name not in names or names[name].file != file:
                raise InputError(
                    f"the index of the {with_path(self.role, self.path)} does not fit its shards",
                    expected=f"tensor {name!r:.200} in {file.name}",
                    got=f"it in {names[name].file.name}" if name in names else "no such tensor",
                    fix="Index and shards are of different saves: download or save both again",
                )
        extra = [name for name in names if name not in weight_map]
        if extra:
            self.notes.append(
                f"{len(extra)} tensors of the {self.role} are not in its index and are left out: "
                f"{some(extra)}"
            )
        return {name: info for name, info in names.items() if name in weight_map}

    def _find_aliases(self) -> dict[str, str]:
        first: dict[object, str] = {}
        aliases = {}
        for name, info in self.names.items():
            key = (info.file, info.offset, info.shape, info.stride, info.dtype)
            if info.nbytes and first.setdefault(key, name) != name:
                aliases[name] = first[key]
        return aliases
