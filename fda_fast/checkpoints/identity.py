"""Is an expert the base model itself? Asked before hours of work, answered mostly from samples."""

from __future__ import annotations

import torch

from fda_fast.checkpoints.align import ExpertView, zero_task_vectors
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.errors import InputError

# Tensors compared whole before giving up hope and comparing all of them.
_FIRST = 4


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

    Cost: for a real fine-tune a few tensors of one layer; for a copy one read of both.
    """
    changed = set(view.changed)
    for spec in sorted(layout.layers, key=lambda spec: spec.name != layout.layers[-1].name):
        names = [name for name in spec.parameters.values() if name in changed]
        # Small tensors first: biases and norms are cheap to read and trained too.
        names.sort(key=lambda name: view.base.names[name].nbytes)
        for group in (names[:_FIRST], names[_FIRST:]):
            if _differ(view, group):
                return
    raise InputError(
        f"the {view.role} {view.expert.path} is identical to the {view.base.role} in every layer",
        expected="a fine-tuned model",
        got="the same weights" + (" beside its own head" if view.ignored else ""),
        fix="Check its path: there is nothing to merge from it",
    )


def _differ(view: ExpertView, names: list[str]) -> bool:
    if not names:
        return False
    if view.expert.adapter is not None:
        # Its task vector is exact: no rounding to allow for.
        return len(zero_task_vectors(view.task_vectors(names))) < len(names)
    pretrained = view.base.read(names)
    finetuned = view.read(names, dtype=None, pretrained=pretrained)
    for name in names:
        ours, theirs = pretrained[name], finetuned[name]
        coarser = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(ours.to(coarser), theirs.to(coarser)):
            return True
    return False
