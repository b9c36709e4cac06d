"""The tables printed before and after a merge."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fda_fast.progress import clock

_FEW = 4
"""Layers up to this number are listed one by one."""

if TYPE_CHECKING:
    from fda_fast.merge import Report
    from fda_fast.planning import Plan, PlanRow


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to ``exits.guarded``: rich would end the program as if something had failed."""
        raise BrokenPipeError


def console() -> Console:
    """Standard output; in a pipe or a file wide enough that nothing is cut."""
    return _Output(width=None if sys.stdout.isatty() else 200, highlight=False)


def size(count: int) -> str:
    """Bytes for people: "312 kB", "4.71 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def table(report: Report) -> Group:
    """What a person wants to know at the end, for a rich console.

    Per layer the mean over tasks of the alignment loss and of the mean cosine, and the adaptation
    loss of the first and the last epoch; then where the time went.
    """
    parts: list[Table | Text] = []
    if any(layer.tasks for layer in report.layers):
        parts.append(_layers(report))
    spent = "  ".join(
        f"{phase} {clock(seconds)}" for phase, seconds in report.seconds.items() if seconds >= 1
    )
    if report.output.exists():
        done = f"written: {report.output}"
    elif report.unfinished:
        done = f"{report.unfinished} layer(s) left to other shards"
    else:
        done = "all layers are finished; --assemble writes the model"
    parts.append(Text(done + (f"   ({spent})" if spent else "")))
    overlapped = sum(report.seconds.get(phase, 0.0) for phase in ("read", "save"))
    hidden = max(0.0, overlapped - report.seconds.get("wait", 0.0))
    if hidden >= 1:
        parts.append(Text(f"{clock(hidden)} of reading and saving went on beside the computation"))
    return Group(*parts)


def _layers(report: Report) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("layer")
    for heading in ("alignment loss", "mean cosine", "adaptation loss", "seconds"):
        shown.add_column(heading, justify="right")
    for layer in report.layers:
        tasks = list(layer.tasks.values())
        loss = sum(task.loss for task in tasks) / max(1, len(tasks))
        cosine = sum(task.mean_cosine for task in tasks) / max(1, len(tasks))
        fitted = "-"
        if layer.adaptation is not None:
            first, last = layer.adaptation
            fitted = f"{first:.4g} -> {last:.4g}"
        seconds = f"{sum(layer.seconds.values()):.1f}" if layer.seconds else "earlier"
        shown.add_row(layer.layer, f"{loss:.4f}", f"{cosine:.3f}", fitted, seconds)
    return shown


def plan_view(plan: Plan) -> Group:
    """What ``fda-fast plan`` prints: layers, settings, memory, disk, time and notes.

    Alike layers one after the other are one line.

    Args:
        plan: the merge and its estimates.
    """
    job, speed = plan.job, plan.speed
    settings, made, fitted = job.settings, job.settings.construct, job.settings.adapt
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layer", "kind"):
        shown.add_column(heading)
    for heading in ("parameters", "anchors", "memory", "GFLOP/step", "time"):
        shown.add_column(heading, justify="right")
    for first, count in _alike(plan.rows):
        row = plan.rows[first]
        name = row.layer
        if count > 1:
            name += f" ... {plan.rows[first + count - 1].layer} ({count})"
        shown.add_row(
            name,
            row.kind,
            f"{row.parameters:,}",
            str(list(row.anchors)) if settings.optimises else "-",
            size(row.memory_bytes),
            f"{row.gflop_per_step:,.3g}" if settings.optimises else "-",
            clock(row.seconds * count) if settings.optimises else "-",
        )
    lines = [
        f"experts: {', '.join(job.experts)}",
        f"method: {settings.method}, start {settings.start}, tensors outside the layers from "
        f"{settings.outside}, device {job.device}",
    ]
    if settings.optimises:
        timed = f"steps of {speed.layer}" if speed.layer else "steps of a smaller MLP"
        lines += [
            f"preset: {settings.preset}; {made.steps} steps at lr {made.lr:g}, {made.distance}, "
            f"from {made.init}; {fitted.epochs} epochs at lr {fitted.lr:g}, batch "
            f"{fitted.batch_size}, {fitted.distance}",
            f"time: about {clock(plan.seconds)}, of which {clock(plan.write_seconds)} to write; "
            f"measured here: {timed} at {speed.gflops:,.0f} GFLOP/s",
        ]
    read, write = (
        f"{'an assumed ' if assumed else ''}{rate / 1e9:.2g} GB/s"
        for rate, assumed in (
            (speed.read, speed.assumed_read),
            (speed.write, speed.assumed_write),
        )
    )
    lines += [
        f"reads {size(plan.read_bytes)}, writes {size(plan.written_bytes)}, at "
        f"{read} from the disk and {write} to it",
        f"memory: about {size(plan.memory_bytes)} at once"
        + ("" if plan.limits.overlap else ", without reading ahead"),
    ]
    if plan.limits.gpu_memory:
        lines.append(
            f"GPU memory: about {size(plan.limits.gpu_memory)}, {plan.limits.batch} experts in a "
            "batch"
        )
    if plan.limits.part is not None:
        parts = math.ceil(made.anchors / plan.limits.part)
        lines.append(
            f"anchors: {plan.limits.part} of {made.anchors} at once, in {parts} parts, for want of "
            "memory; that takes up to a third longer"
        )
    lines.append(f"disk: {size(plan.disk_bytes)}, the work beside the output included")
    lines += [f"note: {note}" for note in job.notes]
    return Group(shown, *map(Text, lines))


def _alike(rows: Sequence[PlanRow]) -> list[tuple[int, int]]:
    """(first index, count) of runs of layers that differ in their names alone; short ones apart."""
    runs: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        if runs and replace(rows[runs[-1][0]], layer=row.layer) == row:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((index, 1))
    if len(rows) <= _FEW:
        return [(index, 1) for index in range(len(rows))]
    return runs
