"""How a configuration names a checkpoint: a path, ``org/name[@revision]``, ``path+adapter``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fda_fast import hub
from fda_fast.errors import InputError, with_path


def absolute(reference: str, folder: Path) -> str:
    """A reference seen from ``folder``, both parts of ``path+adapter``; Hub ids stay."""
    whole = folder / Path(reference).expanduser()
    if os.path.lexists(whole):
        return str(whole)
    if "+" in reference:
        return "+".join(absolute(part, folder) for part in reference.split("+", 1))
    return reference if hub.is_hub_id(reference) else str(whole)


def split_reference(reference: str) -> tuple[str, str | None]:
    """``path+adapter`` taken apart, unless the whole is a path."""
    if "+" not in reference or os.path.lexists(Path(reference).expanduser()):
        return reference, None
    path, adapter = reference.split("+", 1)
    return path, adapter


def without_revision(reference: str) -> str:
    """A Hub id without its ``@revision``; any other reference as it is."""
    if os.path.lexists(Path(reference).expanduser()):
        return reference
    plain = reference.partition("@")[0]
    return plain if hub.is_hub_id(plain.rsplit("+", 1)[-1]) else reference


def look_up(references: Iterable[str]) -> None:
    """Ask the Hub about all of its models at once, so that no error follows a long download.

    Args:
        references: as a configuration has them.

    Raises:
        InputError: a model or revision that the Hub does not have.

    Cost: one request for each Hub id that is no local path; none offline.
    """
    for reference in references:
        for part in split_reference(reference):
            if part is None or os.path.lexists(Path(part).expanduser()):
                continue
            if hub.is_hub_id(part):
                hub.look_up(part)


def remote(reference: str, what: str) -> hub.HubModel | None:
    """The model on the Hub that ``locate`` would have to download; None if it is here.

    Raises:
        InputError: as ``hub.find``.
    """
    if os.path.lexists(Path(reference).expanduser()) or not hub.is_hub_id(reference):
        return None
    found = hub.find(reference, what)
    return found if isinstance(found, hub.HubModel) else None


def locate(reference: str, what: str) -> Path:
    """The folder or file of a reference.

    Args:
        reference: a path, or a Hub id ``org/name[@revision]``, which is downloaded if it is not
            in the local cache (see ``hub.fetch``).
        what: what refers to it, for errors.

    Raises:
        InputError: neither; or as ``hub.fetch``.
    """
    path = Path(reference).expanduser()
    if os.path.lexists(path):  # what is wrong with a broken link is for the reader to say
        return path
    plain, at, _ = reference.partition("@")
    if at and os.path.lexists(Path(plain).expanduser()):
        raise InputError(
            f"{with_path(what, reference)}: a revision of a local folder",
            fix="Only models of the Hub have revisions: leave out what follows the @.",
        )
    if not hub.is_hub_id(reference):
        raise InputError(f"{with_path(what, reference)}: no such file or folder")
    found = hub.fetch(reference, what)
    if found is None:
        raise InputError(
            f"{with_path(what, reference)}: no such file or folder, not in the Hub's cache, and "
            "the Hub cannot be reached",
            fix="Check the path, or the connection and HF_HUB_OFFLINE.",
        )
    return found
