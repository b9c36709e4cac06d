"""Is an expert the base model itself? Asked before hours of work, answered mostly from samples."""

from __future__ import annotations

from dataclasses import replace

import torch

from fda_fast.checkpoints.align import ExpertView, zero_task_vectors
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.tensorfile import TensorFile
from fda_fast.errors import InputError, with_path

# Tensors compared whole before giving up hope and comparing all of them.
_FIRST = 4
# Elements of each tensor that are compared before any is read whole.
_HEAD = 4096


def check_differs(view: ExpertView, layout: ModelLayout) -> None:
    """Refuse an expert whose layers all equal the base's.

    Values are compared in the coarser of the two dtypes, so that a base saved again in bfloat16
    counts as the base; an adapter counts as soon as its product is not zero. The first difference
    ends the search, which begins where training leaves the most: in the last layer. Only a true
    copy is read to the end.

    Args:
        view: the expert.
        layout: the layers that will be merged.

    Raises:
        InputError: no parameter of any layer differs.

    Cost: for a real fine-tune the first bytes of a layer's tensors, of an adapter a few tensors of
    one layer; for a copy one read of both.
    """
    changed = set(view.changed)
    for spec in sorted(layout.layers, key=lambda spec: spec.name != layout.layers[-1].name):
        names = [name for name in spec.parameters.values() if name in changed]
        # Small tensors first: biases and norms are cheap to read and trained too.
        names.sort(key=lambda name: view.base.names[name].nbytes)
        if _heads_differ(view, names):
            return
        for group in (names[:_FIRST], names[_FIRST:]):
            if _differ(view, group):
                return
    raise InputError(
        f"the {with_path(view.role, view.expert.path)} is identical to the {view.base.role} in "
        "every layer",
        expected="a fine-tuned model",
        got="the same weights" + (" beside its own head" if view.ignored else ""),
        fix="Check its path: there is nothing to merge from it",
    )


def _heads_differ(view: ExpertView, names: list[str]) -> bool:
    """Whether the first values of some tensor differ, where those can be read alone."""
    stored: dict[str, str] = getattr(view._source, "found", {})
    for name in names:
        ours = _head(view.base, name)
        theirs = _head(view.expert, stored[name]) if name in stored else None
        if ours is not None and theirs is not None and not _equal(ours, theirs):
            return True
    return False


def _head(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    """The first values of a tensor in a safetensors file."""
    info = checkpoint.names[name]
    if info.file.suffix != ".safetensors" or not info.file.is_file():
        return None
    count = min(info.numel, _HEAD)
    part = replace(info, shape=(count,), nbytes=count * info.dtype.itemsize)
    return TensorFile(info.file, checkpoint.role).read([part])[0]


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    coarser = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(ours.to(coarser), theirs.to(coarser))


def _differ(view: ExpertView, names: list[str]) -> bool:
    if not names:
        return False
    if view.expert.adapter is not None:
        # Its task vector is exact: no rounding to allow for.
        return len(zero_task_vectors(view.task_vectors(names))) < len(names)
    pretrained = view.base.read(names)
    finetuned = view.read(names, dtype=None, pretrained=pretrained)
    return any(not _equal(pretrained[name], finetuned[name]) for name in names)
