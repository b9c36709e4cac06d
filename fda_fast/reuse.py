"""Finished anchors of another merge: which experts they spare construction, and how they differ."""

from __future__ import annotations

from pathlib import Path

from fda_fast.anchors import Anchors
from fda_fast.errors import InputError
from fda_fast.job import Job
from fda_fast.layerwork import construction_settings
from fda_fast.work import file_name


def reuse_notes(job: Job, folder: Path) -> list[str]:
    """Say what a folder of anchors spares a merge.

    Args:
        job: the merge.
        folder: with files <expert>/<layer>.safetensors.

    Returns:
        Sentences: which experts' anchors are there, and which settings they were made with where
        those are not this merge's. They are used as they are.

    Raises:
        InputError: anchors of none of the experts.
    """
    there = {task: _any_of(job, folder, task) for task in job.experts}
    present = [task for task, path in there.items() if path is not None]
    missing = [task for task, path in there.items() if path is None]
    if not present:
        raise InputError(
            f"anchors {folder}: none of these experts",
            expected=", ".join(job.experts),
            got=", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder",
            fix="Folders are named by the experts, files by the layers.",
        )
    text = f"anchors of {', '.join(present)} are taken from {folder.name}"
    notes = [text + (f", those of {', '.join(missing)} are constructed" if missing else "")]
    now = construction_settings(job.settings)
    for task in present:
        path = there[task]
        assert path is not None
        made = Anchors.load(path).settings
        differences = [
            f"{key} {made[key]} (now {value})"
            for key, value in now.items()
            if key in made and made[key] != value
        ]
        if differences:
            notes.append(f"the anchors of {task} were constructed with {', '.join(differences)}")
    return notes


def _any_of(job: Job, folder: Path, task: str) -> Path | None:
    for spec in job.layers:
        path = folder / file_name(task) / f"{file_name(spec.name)}.safetensors"
        if path.is_file():
            return path
    return None
