"""The construction of a layer's anchors once more, with the anchors of several steps kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fda_fast import layers
from fda_fast.layers.graph import AnchorOptimiser, step_runner
from fda_fast.machine import as_recorded

if TYPE_CHECKING:
    from fda_fast.layerwork import LayerInput
    from fda_fast.settings import Settings

SHARES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)


def milestones(steps: int) -> list[int]:
    """Steps to look at in a construction of so many: 0, the last, and some between, rising."""
    return sorted({0, *(max(1, round(share * steps)) for share in SHARES[1:])})


def replay(
    inputs: LayerInput,
    settings: Settings,
    tasks: Sequence[str],
    steps: Mapping[str, Sequence[int]],
    part: int | None = None,
    machine: Mapping[str, Any] | None = None,
) -> dict[str, dict[int, Tensor]]:
    """Construct the anchors of a layer as a merge does, and keep them on the way.

    Construction depends on the checkpoints, the settings and, in its last bits, on batch, part and
    machine alone, so a merge needs to store nothing for this: it is done again.

    Args:
        inputs: the layer.
        settings: of the merge.
        tasks: experts optimised in one batch; none of them unchanged.
        steps: which steps to keep, by task.
        part: anchors of a task that a step holds at once; None for all.
        machine: the record of the one that made them (``machine.here``): as many threads are
            used as there, if there are as many cores.

    Returns:
        {task: {step: [n, (T,) d] float32 on the CPU}}: at step 0 the first anchors, at step s what
        a construction of s steps gives (the best of those evaluated until then).

    Cost: the construction itself, up to the last step wanted.
    """
    with as_recorded(machine or {}):
        return _replay(inputs, settings, tasks, steps, part)


def _replay(
    inputs: LayerInput,
    settings: Settings,
    tasks: Sequence[str],
    steps: Mapping[str, Sequence[int]],
    part: int | None,
) -> dict[str, dict[int, Tensor]]:
    from fda_fast.layerwork import first_anchors

    wanted = settings.construct
    start = torch.stack([first_anchors(inputs, task, settings) for task in tasks])
    problem = layers.bind(
        inputs.pretrained,
        [inputs.finetuned[task] for task in tasks],
        shape=tuple(start.shape[1:]),
        distance=wanted.distance,
        engine=settings.engine,
        precision=settings.precision,
        part=part,
    )
    last = max(max(steps[task]) for task in tasks)
    optimiser = AnchorOptimiser(
        problem,
        start,
        steps=max(1, last),
        lr=wanted.lr,
        weight_decay=wanted.weight_decay,
        betas=wanted.betas,
        eps=wanted.eps,
    )
    run = step_runner(optimiser.step, start.device)
    kept: dict[str, dict[int, Tensor]] = {task: {} for task in tasks}
    for step in range(last + 1):
        if step:
            run()
        for index, task in enumerate(tasks):
            if step in steps[task]:
                kept[task][step] = optimiser.best_anchors[index].to("cpu", torch.float32, copy=True)
    return kept
