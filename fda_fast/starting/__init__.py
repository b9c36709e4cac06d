"""Starting points: Task Arithmetic, TSV-M and WUDI, usable on their own, one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.starting.deltas import Deltas, as_list, working_dtype
from fda_fast.starting.rules import Method, Rules, Treatment, treatment
from fda_fast.starting.task_arithmetic import task_arithmetic
from fda_fast.starting.tsv import tsv
from fda_fast.starting.wudi import wudi

__all__ = [
    "SCALING",
    "Deltas",
    "Method",
    "Rules",
    "Treatment",
    "merge_tensor",
    "task_arithmetic",
    "treatment",
    "tsv",
    "wudi",
]

SCALING: dict[str, float] = {"task_arithmetic": 0.3, "tsv": 1.0, "wudi": 1.0}
"""Factors of the merged task vector in the official vision code; ``presets`` hold the others."""


def merge_tensor(
    method: Method,
    name: str,
    pretrained: Tensor,
    deltas: Deltas,
    *,
    scaling: float | Sequence[float] | None = None,
    rules: Rules = "auto",
    steps: int = 300,
    lr: float = 1e-5,
) -> Tensor:
    """Merge one tensor of a model; a whole model is merged by calling this per tensor.

    Nothing is kept between calls, so a model needs no more memory than its largest tensor times
    the number of experts.

    Args:
        method: "task_arithmetic", "tsv" or "wudi".
        name: the tensor's name in the checkpoint; ``rules`` go by it.
        pretrained: [*s]. An integer or boolean tensor (position ids) is returned as it is.
        deltas: K task vectors, a tensor [K, *s] or a sequence of tensors [*s].
        scaling: factor of the merged task vector, ``SCALING[method]`` if None; for Task
            Arithmetic also one per task.
        rules: which tensors count, see ``rules.treatment``.
        steps, lr: of WUDI.

    Returns:
        [*s], merged; float32 (float64 if ``pretrained`` is) for floating-point tensors.

    Raises:
        InputError: unknown method or rules, shapes that differ, NaN or infinity, named ``name``.
    """
    chosen = treatment(method, name, pretrained.ndim, rules)
    if not pretrained.is_floating_point():
        return pretrained
    factor = SCALING[method] if scaling is None else scaling
    try:
        if chosen == "sum":
            return task_arithmetic(pretrained, deltas, factor)
        if not isinstance(factor, int | float):
            raise InputError("scaling", expected="one number, except for task_arithmetic")
        listed = as_list(deltas, pretrained.shape)
        if chosen == "pretrained":
            return pretrained.detach().to(working_dtype(pretrained), copy=True)
        if chosen == "svd":
            merged = tsv(listed)
        elif chosen == "wudi":
            merged = wudi(listed, steps=steps, lr=lr)
        else:
            return task_arithmetic(pretrained, listed, factor / len(listed))
    except InputError as error:
        raise InputError(f"tensor {name!r}: {error}") from error
    except torch.linalg.LinAlgError as error:
        raise InputError(f"tensor {name!r} has no usable decomposition", got=str(error)) from error
    return (merged.double() * factor + pretrained.detach()).to(working_dtype(pretrained))
