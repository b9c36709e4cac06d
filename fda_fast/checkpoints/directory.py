"""What a checkpoint directory holds: which files, where they really are, and what its JSON says."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fda_fast.checkpoints.headers import parse_json
from fda_fast.checkpoints.tensorfile import TensorFile
from fda_fast.errors import InputError, with_path

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What split_model.py of the published language-model code writes: one pickled module per file.
SPLIT_INDEX = "model_index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_JSON = 200_000_000
_CONTENTS = (
    "a Hugging Face model directory (config.json with model.safetensors, or shards with "
    "model.safetensors.index.json, or pytorch_model.bin), a PEFT adapter directory, a "
    "split/ folder with model_index.json, or one .safetensors, .bin, .pt or .pth file"
)


@dataclass(frozen=True)
class Contents:
    """The weight files of one checkpoint.

    Attributes:
        files: the weight files, in order.
        weight_map: {tensor: file} of the index; None for a single file.
        config: config.json, None where there is none.
        adapter: adapter_config.json of a PEFT directory, None otherwise.
        modules: {file: the module in it}, where every file holds one module of the model.
        beside: the directory with config.json and tokenizer; None for a single file.
    """

    files: tuple[Path, ...]
    weight_map: dict[str, Path] | None
    config: dict[str, Any] | None
    adapter: dict[str, Any] | None
    modules: dict[Path, str] = field(default_factory=dict)
    beside: Path | None = None


def find(path: Path, role: str) -> Contents:
    """The weight files under ``path``, as transformers would pick them.

    Raises:
        InputError: nothing there, nothing usable there, an index that points outside the
            directory or at missing shards, broken JSON, links that lead in circles.
    """
    kind = _kind(path, role)
    if kind == "file":
        return Contents((path,), None, None, None)
    config = read_config(path, role)
    adapter = None
    if _present(path / ADAPTER_CONFIG, role):
        adapter = read_object(path, ADAPTER_CONFIG, role)
    found = [name for name in (*SINGLE, *INDEXED) if _present(path / name, role)]
    if adapter is not None:
        if found:
            raise InputError(
                f"the {with_path(role, path)} is both a model and an adapter",
                got=f"{ADAPTER_CONFIG} and {found[0]}",
                fix="Keep one of the two in a directory of its own",
            )
        found = [name for name in ADAPTER_FILES if _present(path / name, role)]
        if not found:
            raise InputError(
                f"the adapter {path} of the {role}", expected=" or ".join(ADAPTER_FILES)
            )
        return Contents((inside(path, found[0], role),), None, config, adapter, beside=path)
    # The order in which transformers looks.
    for single, index in zip(SINGLE, INDEXED, strict=True):
        if single in found:
            return Contents((inside(path, single, role),), None, config, None, beside=path)
        if index in found:
            weight_map = read_index(path, index, role)
            files = tuple(dict.fromkeys(weight_map.values()))
            return Contents(files, weight_map, config, None, beside=path)
    if _present(path / SPLIT_INDEX, role):
        return _split(path, config, role)
    raise InputError(
        f"the {with_path(role, path)} holds no weights",
        expected=_CONTENTS,
        got=_listing(path),
        fix=_hint(path),
    )


def _kind(path: Path, role: str) -> str:
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"the {with_path(role, path)}",
            expected=_CONTENTS,
            got=reason,
            fix="A model hub name is not looked up: download it first and give its directory"
            if not path.is_absolute() and len(path.parts) <= 2
            else None,
        ) from error
    return "directory" if path.is_dir() else "file"


def _present(path: Path, role: str) -> bool:
    """Whether a name is there at all; a link that leads nowhere or in circles is an error."""
    if not os.path.lexists(path):
        return False
    try:
        os.stat(path)
    except OSError as error:
        raise InputError(
            f"file {path} of the {role}", got=f"a broken link ({error.strerror})"
        ) from error
    return True


def inside(directory: Path, name: Any, role: str) -> Path:
    """The path of a file that the directory's own contents name, which must not lead out of it.

    Links into the blobs of a Hugging Face cache snapshot are how that cache is built.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(
            f"index of the {with_path(role, directory)}", expected="file names", got=repr(name)[:80]
        )
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise InputError(
            f"index of the {with_path(role, directory)} points outside the directory",
            got=name,
            fix="An index may only name files beside it",
        )
    path = directory / name
    try:
        root, real = directory.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "links that lead in circles"
        raise InputError(f"file {path} of the {role}", got=reason) from error
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not real.is_relative_to(root) and not real.is_relative_to(blobs):
        raise InputError(
            f"file {path} of the {role} is a link to a file outside the directory",
            got=str(real),
            fix="Copy the file here, or give the directory that really holds it",
        )
    return path


def read_index(
    directory: Path, name: str, role: str, *, there: Collection[str] | None = None
) -> dict[str, Path]:
    """Where the index of a sharded checkpoint says each tensor is.

    Args:
        directory: with the index.
        name: of the index.
        role: whose it is, for messages.
        there: names of the shards, if they are somewhere else; None looks for them.

    Raises:
        InputError: no weight map, shards that are missing or outside the directory.
    """
    index = read_object(directory, name, role)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{directory / name} of the {role}", expected="a weight_map of names and files"
        )
    shards = {}
    missing = []
    for shard in dict.fromkeys(map(str, weight_map.values())):
        leads_out = os.path.isabs(shard) or ".." in Path(shard).parts
        if there is not None and shard in there:
            shards[shard] = directory / shard
        elif not leads_out and not os.path.lexists(directory / shard):
            missing.append(repr(shard)[:80])
        else:
            shards[shard] = inside(directory, shard, role)
    if missing:
        raise InputError(
            f"the {with_path(role, directory)} lacks {len(missing)} of "
            f"{len(missing) + len(shards)} files that {name} names",
            got="no " + ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else ""),
            fix="Finish the download, or copy the missing files here",
        )
    return {tensor: shards[str(shard)] for tensor, shard in weight_map.items()}


def _split(directory: Path, config: dict[str, Any] | None, role: str) -> Contents:
    """A folder with a pickled module per file, whose config.json is one folder above."""
    index = read_object(directory, SPLIT_INDEX, role)
    modules: dict[Path, str] = {}
    for name, file in index.items():
        path = inside(directory, file, role)
        if path in modules or not name.isprintable():
            raise InputError(
                f"{directory / SPLIT_INDEX} of the {role}",
                expected="one file for each module",
                got=f"{file!r:.80} for {name!r:.80}",
            )
        modules[path] = name
    if not modules:
        raise InputError(f"{directory / SPLIT_INDEX} of the {role}", expected="modules and files")
    if config is None:
        directory = directory.resolve().parent
        config = read_config(directory, role)
    return Contents(tuple(modules), None, config, None, modules, directory)


def read_config(directory: Path, role: str) -> dict[str, Any] | None:
    """config.json, None where there is none.

    Raises:
        InputError: broken JSON, a quantised model.
    """
    if not _present(directory / "config.json", role):
        return None
    config = read_object(directory, "config.json", role)
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"the {with_path(role, directory)} is quantised",
            expected="unquantised weights",
            got=f"quantization method {method!r} in config.json",
            fix="Use the checkpoint this one was quantised from",
        )
    return config


def read_object(directory: Path, name: str, role: str) -> dict[str, Any]:
    """A JSON object of the directory.

    Raises:
        InputError: no such file, too large, not JSON, no object.
    """
    file = TensorFile(inside(directory, name, role), role)
    if file.size > _MAX_JSON:
        raise InputError(f"{file.path} of the {role}", expected=f"at most {_MAX_JSON} bytes")
    value = parse_json(file.read_bytes(0, file.size), f"{file.path} of the {role}")
    if not isinstance(value, dict):
        raise InputError(
            f"{file.path} of the {role}", expected="a JSON object", got=type(value).__name__
        )
    return value


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:  # no permission: the caller says what it did not find
        return []


def _listing(path: Path) -> str:
    names = _names(path)
    shown = ", ".join(repr(name) for name in names[:8])
    return f"{shown}{', ...' if len(names) > 8 else ''}" if names else "an empty directory"


def _hint(path: Path) -> str | None:
    names = _names(path)
    if any("-of-" in name for name in names):
        return "The shards are there but not their index (model.safetensors.index.json)"
    weights = [n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    if weights:
        return f"To use one file, name it: {path / weights[0]}"
    if any(name.endswith((".onnx", ".gguf", ".h5", ".msgpack")) for name in names):
        return "Weights of other frameworks are not read: convert them to safetensors first"
    return None
