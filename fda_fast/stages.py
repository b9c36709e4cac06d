"""The two halves of a merge under way: its layers, here or elsewhere, and what is written then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fda_fast.budget import Limits
from fda_fast.errors import InputError
from fda_fast.job import Job
from fda_fast.layerwork import LayerResult
from fda_fast.output import keeps_layers, publish_anchors, write_models
from fda_fast.pipeline import process_layers
from fda_fast.progress import Display
from fda_fast.resources import Resources
from fda_fast.work import WorkDirectory


@dataclass(frozen=True)
class Task:
    """A merge under way.

    Attributes:
        job: what to do.
        work: where it is kept, open.
        shown: the display.
        limits: how to keep within memory.
        resources: where to run.
        mode: "merge", "construct" or "adapt".
        anchors: folder of finished anchors, or None.
    """

    job: Job
    work: WorkDirectory
    shown: Display
    limits: Limits
    resources: Resources
    mode: str
    anchors: Path | None


def check_batch(work: WorkDirectory, limits: Limits) -> None:
    """Refuse to go on with work that was begun with more at once than there is memory for now.

    Raises:
        InputError: with both numbers.
    """
    choices = (
        ("experts in a batch", work.batch, limits.batch),
        ("anchors at once", work.part or math.inf, limits.part or math.inf),
    )
    for what, before, now in choices:
        if before > now:
            count = "all" if before == math.inf else before
            raise InputError(
                f"{work.path} was begun with {count} {what}, for which there is no memory now",
                expected=f"room for {count}",
                got=f"room for {now}",
                fix="Free or allow as much as then, or use --restart.",
            )


def unfinished(job: Job, work: WorkDirectory) -> list[int]:
    """Numbers of the layers that are not finished."""
    if not keeps_layers(job):
        return []
    return [i for i, spec in enumerate(job.layers) if not work.is_finished(spec.name)]


def do_layers(task: Task) -> tuple[list[LayerResult], float]:
    """Results of the layers that are finished, and the seconds that computing stood still.

    Raises:
        InputError, OSError, RuntimeError: as ``merge``; layers missing with ``assemble``.
    """
    job, work, resources = task.job, task.work, task.resources
    if not keeps_layers(job):
        if resources.shard is not None:
            raise InputError(f"method {job.settings.method} has no work worth sharing out")
        return [LayerResult(spec.name) for spec in job.layers], 0.0
    pending = unfinished(job, work)
    if resources.assemble and pending:
        raise InputError(
            f"{len(pending)} of {len(job.layers)} layers are not finished",
            expected="every shard done",
            got=f"{job.layers[pending[0]].name} missing",
            fix="Run the missing shards, or merge without --assemble, which does them here.",
        )
    task.shown.start(len(job.layers), len(job.layers) - len(pending))
    if resources.shard is not None:
        pending = [index for index in pending if resources.shard.takes(index)]
    if resources.ray is not None:
        from fda_fast.distributed import process_layers as distribute

        done, waited = distribute(
            job, work, pending, task.shown, resources, mode=task.mode, source=task.anchors
        )
    else:
        done, waited = process_layers(
            job,
            work,
            pending,
            task.shown,
            mode=task.mode,
            source=task.anchors,
            overlap=task.limits.overlap,
        )
    for index, spec in enumerate(job.layers):
        if index not in done and work.is_finished(spec.name):
            done[index] = LayerResult.from_record(work.load_record(spec.name))
    return [done[index] for index in sorted(done)], waited


def write(task: Task, target: Path, layers: list[LayerResult], keep_anchors: bool) -> None:
    """Publish the anchors, or write the model.

    Args:
        task: with every layer finished.
        target: the output folder.
        layers: results, for the report.
        keep_anchors: copy the anchors to ``target/anchors``.
    """
    if task.mode == "construct":
        publish_anchors(task.work, target)
        return
    write_models(
        task.job,
        task.work,
        target,
        layers,
        display=task.shown,
        keep_anchors=keep_anchors,
        kept=[] if task.anchors is None else [task.anchors],
        overlap=task.limits.overlap,
    )


def total_seconds(layers: list[LayerResult]) -> dict[str, float]:
    """Seconds by phase, over all layers."""
    seconds: dict[str, float] = {}
    for layer in layers:
        for phase, spent in layer.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    return seconds
