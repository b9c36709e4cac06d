"""Files the suites keep outside git: trained weights, anchors, scores; checked before reuse.

A stored file is used only if its record names the same settings and the file still has the hash
that was recorded. Writing is atomic, so a run that is cut off continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import neighbours  # noqa: F401
from assets import cache_directory
from safetensors.torch import load_file, save_file
from torch import Tensor


def folder(suite: str) -> Path:
    """Where a suite keeps its files: ``quality/<suite>`` in the examples' cache."""
    return cache_directory() / "quality" / suite


def key_of(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits that stand for JSON-like settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors(
    where: Path,
    name: str,
    settings: Mapping[str, Any],
    make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and a record, out of ``where`` or newly made.

    Args:
        where: folder of the suite.
        name: of the file; together with the settings' key.
        settings: everything the tensors depend on, JSON values.
        make: returns tensors and notes (JSON values: accuracies, seconds).

    Returns:
        (tensors, record); the record holds "settings", "sha256" of the file and the notes.
    """
    path = where / f"{name}-{key_of(settings)}.safetensors"
    log = path.with_suffix(".json")
    if log.exists() and path.exists():
        record = json.loads(log.read_text())
        if record["settings"] == json.loads(json.dumps(settings)) and (
            record["sha256"] == file_hash(path)
        ):
            return load_file(path), record
        print(f"{path.name} is not what its record says: made again", flush=True)
    found, notes = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({key: value.detach().contiguous() for key, value in found.items()}, part)
    part.replace(path)
    record = {"settings": dict(settings), "sha256": file_hash(path), **notes}
    write_json(log, record)
    return dict(found), record


def values(
    where: Path, name: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """As ``tensors``, for a result that is JSON itself."""
    path = where / f"{name}-{key_of(settings)}.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] == json.loads(json.dumps(settings)):
            return record["value"]
    value = make()
    write_json(path, {"settings": dict(settings), "value": value})
    return value


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)
