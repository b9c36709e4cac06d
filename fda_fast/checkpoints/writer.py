"""Writing the merged model: shards, index, config, tokenizer and card, all at once or not at all.

Every shard's size is known before the first tensor, so each shard is created at its full size
(a disk too small shows at once) and tensors are written to their places in whatever order they
come. The directory is built beside the output under another name and renamed when complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fda_fast.checkpoints.headers import DTYPES
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.names import output_name
from fda_fast.checkpoints.outputs import (
    check_disk,
    check_output,
    clear_scratch,
    copy_side_files,
    sync_directory,
)
from fda_fast.checkpoints.reader import some
from fda_fast.errors import InputError

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class MergedWriter:
    """A checkpoint being written, in the form of the base model.

    Use as a context manager: ``finish`` publishes the directory, leaving without it removes what
    was written. The same tensors, settings and texts give the same bytes.

    Args:
        output: the directory to create; it may exist if empty.
        layout: the base model: its names, shapes, dtypes, config and tokenizer are taken over.
        dtype: of floating point tensors; None keeps the base's dtype tensor by tensor.
        shard_size: most bytes per shard: 5_000_000_000, "5GB", "500MB", "2GiB".
        scratch: a directory of the caller's to build in, on the file system of ``output``, that
            is removed if it exists; default ".<name>.partial" beside the output, which is only
            removed if a run of ours left it.

    Attributes:
        names: the base's names of every tensor to add, in the order of the files. Tied tensors
            are left out: their twin is written.
        nbytes: bytes of all of them as written.

    Raises:
        InputError: output not empty, disk too small, unknown dtype or shard size.
        OSError: the file system refuses; errno.ENOSPC if it filled up meanwhile.
    """

    def __init__(
        self,
        output: str | Path,
        layout: ModelLayout,
        *,
        dtype: torch.dtype | None = None,
        shard_size: int | str = "5GB",
        scratch: str | Path | None = None,
    ) -> None:
        self.output = Path(os.path.abspath(Path(output).expanduser()))
        self._layout, self._dtype = layout, dtype
        if dtype is not None and not dtype.is_floating_point:
            raise InputError("dtype of the output", expected="a floating point dtype", got=dtype)
        self.names = [name for name in layout.base.names if name not in layout.tied]
        self._dtypes = {name: self._written_dtype(name) for name in self.names}
        self._sizes = {
            name: layout.base.names[name].numel * self._dtypes[name].itemsize for name in self.names
        }
        self.nbytes = sum(self._sizes.values())
        check_output(self.output)
        check_disk(self.output, self.nbytes)
        self._scratch = (
            Path(scratch) if scratch else self.output.with_name(f".{self.output.name}.partial")
        )
        self._places: dict[str, tuple[Path, int]] = {}
        self._added: set[str] = set()
        self._shards = shard_names(self._sizes, parse_size(shard_size))
        if scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        else:
            clear_scratch(self._scratch)
        self._scratch.mkdir(parents=True)
        try:
            for shard, names in self._shards.items():
                self._create(shard, names)
        except BaseException:
            self.close()
            raise

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place.

        Args:
            name: the base's name, one of ``names``; a tied name is accepted and skipped.
            tensor: the base's shape; any dtype, device and strides.

        Raises:
            InputError: unknown name, another shape, or a finite value that the output's dtype
                cannot hold.
            OSError: as the operating system says.

        Cost: one conversion and one write; nothing is kept.
        """
        if name in self._layout.tied:
            return
        if name not in self._places:
            raise InputError(f"tensor {name!r}", expected="a tensor of the base model")
        shape = self._layout.base.names[name].shape
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"merged tensor {name!r}", expected=list(shape), got=list(tensor.shape)
            )
        value = tensor.detach().to(self._dtypes[name]).cpu().contiguous()
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"merged tensor {name!r} is not finite in {str(value.dtype)[6:]}",
                got=f"values up to {tensor.abs().max().item():g}",
                fix="Write it in a wider dtype: float32, or bfloat16 in place of float16",
            )
        path, offset = self._places[name]
        if value.numel():
            with open(path, "r+b", buffering=0) as stream:
                stream.seek(offset)
                _write_all(stream, value.reshape(-1).view(torch.uint8).numpy().data)
        self._added.add(name)

    def finish(self, *, card: str, config_yaml: str = "") -> Path:
        """Add config, tokenizer, card and index, and let the directory appear under its name.

        Args:
            card: README.md (see ``checkpoints.card.model_card``).
            config_yaml: the merge configuration, written as fda_config.yml and, for tools that
                know merges of mergekit, as mergekit_config.yml; "" writes none.

        Returns:
            The output directory.

        Raises:
            InputError: tensors are missing.
            OSError: as the operating system says.
        """
        missing = [name for name in self.names if name not in self._added]
        if missing:
            raise InputError(f"{len(missing)} tensors were never added", got=some(missing))
        if len(self._shards) > 1:
            _write_json(self._scratch / "model.safetensors.index.json", self._index())
        copy_side_files(self._layout.base, self._scratch)
        self._write_config()
        (self._scratch / "README.md").write_text(card, encoding="utf-8")
        if config_yaml:
            # mergekit's own name for it too: tools of the Hub look for that one.
            for name in ("fda_config.yml", "mergekit_config.yml"):
                (self._scratch / name).write_text(config_yaml, encoding="utf-8")
        for path in self._scratch.rglob("*"):
            if path.is_file():
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())
        sync_directory(self._scratch)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if self.output.is_dir():
            self.output.rmdir()  # empty, or this fails: never overwrite
        os.rename(self._scratch, self.output)
        sync_directory(self.output.parent)
        return self.output

    def close(self) -> None:
        """Remove what was written, unless ``finish`` has published it."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> MergedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _written_dtype(self, name: str) -> torch.dtype:
        stored = self._layout.base.names[name].dtype
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def _create(self, shard: str, names: list[str]) -> None:
        """The shard's file at its full size, with its header."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        offsets = {}
        for name in names:
            header[output_name(name)] = {
                "dtype": _CODES[self._dtypes[name]],
                "shape": list(self._layout.base.names[name].shape),
                "data_offsets": [position, position + self._sizes[name]],
            }
            offsets[name] = position
            position += self._sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = self._scratch / shard
        with open(path, "wb", buffering=0) as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, 8 + len(text) + position)
            else:
                os.truncate(stream.fileno(), 8 + len(text) + position)
            _write_all(stream, memoryview(len(text).to_bytes(8, "little") + text))
        for name, offset in offsets.items():
            self._places[name] = path, 8 + len(text) + offset

    def _index(self) -> dict[str, Any]:
        weight_map = {output_name(n): shard for shard, ns in self._shards.items() for n in ns}
        return {
            "metadata": {"total_size": self.nbytes},
            "weight_map": dict(sorted(weight_map.items())),
        }

    def _write_config(self) -> None:
        """The base's config.json, with the written dtype and what an old one may lack.

        None for a pickled module: no library has a config for it.
        """
        base, model = self._layout.base, self._layout.model
        if not hasattr(model, "config"):
            return
        config = dict(base.config or {})
        config.setdefault("architectures", [type(model).__name__])
        config.setdefault("model_type", model.config.model_type)
        if self._dtype is not None:
            config = _with_dtype(config, str(self._dtype).removeprefix("torch."))
        if config == base.config and base.directory is not None:
            shutil.copyfile(base.directory / "config.json", self._scratch / "config.json")
        else:
            _write_json(self._scratch / "config.json", config)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or a number.

    Raises:
        InputError: none of these, or less than one byte.
    """
    found = re.fullmatch(r"(\d+)\s*([KMG]i?B)?", str(size).strip(), re.IGNORECASE)
    if isinstance(size, bool) or found is None or int(found[1]) < 1:
        raise InputError("shard size", expected='such as "5GB" or "500MB"', got=repr(size))
    return int(found[1]) * _UNITS[(found[2] or "").upper()]


def shard_names(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """{file name: tensor names}: filled in order, a tensor above the limit alone in its shard."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config saying ``dtype`` wherever it said one, and at its top in any case."""

    def replace(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: dtype if k in ("dtype", "torch_dtype") else replace(v) for k, v in value.items()}

    replaced: dict[str, Any] = replace(config)
    if "dtype" not in replaced:
        # The older name, which every transformers version reads.
        replaced["torch_dtype"] = dtype
    return replaced


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_all(stream: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += stream.write(view[done : done + (1 << 30)])
