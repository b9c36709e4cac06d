"""How a configuration names a checkpoint: a path, a Hub id in the cache, ``path+adapter``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fda_fast.errors import InputError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def cached_snapshot(reference: str) -> Path | None:
    """Folder of the Hub id ``org/name[@revision]`` in the local cache; nothing is downloaded."""
    name, _, revision = reference.partition("@")
    if not _HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def absolute(reference: str, folder: Path) -> str:
    """A reference seen from ``folder``: both parts of ``path+adapter``, or a cached snapshot."""
    whole = folder / Path(reference).expanduser()
    if not os.path.lexists(whole) and "+" in reference:
        return "+".join(absolute(part, folder) for part in reference.split("+", 1))
    if not os.path.lexists(whole) and (cached := cached_snapshot(reference)):
        return str(cached)
    return str(whole)


def split_reference(reference: str) -> tuple[str, str | None]:
    """``path+adapter`` taken apart, unless the whole is a path."""
    if "+" not in reference or os.path.lexists(Path(reference).expanduser()):
        return reference, None
    path, adapter = reference.split("+", 1)
    return path, adapter


def locate(reference: str, what: str) -> Path:
    """The folder or file of a reference.

    Args:
        reference: a path, or a Hub id ``org/name[@revision]`` that was downloaded earlier.
        what: what refers to it, for errors.

    Raises:
        InputError: neither; nothing is downloaded.
    """
    path = Path(reference).expanduser()
    if os.path.lexists(path):  # what is wrong with a broken link is for the reader to say
        return path
    cached = cached_snapshot(reference)
    if cached is not None:
        return cached
    raise InputError(
        f"{what} {reference}: no such file or folder",
        fix="Nothing is downloaded here: a model of the Hub needs `hf download ORG/NAME` first.",
    )
