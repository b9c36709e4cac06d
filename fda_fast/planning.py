"""What a merge would take: time, memory and disk, from headers, or from a model's config alone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fda_fast import estimate
from fda_fast.budget import Limits, choose_limits, workload
from fda_fast.calibrate import ASSUMED_READ, ASSUMED_WRITE, Speed, calibrate, start_flop
from fda_fast.config import MergeConfig, load, parse
from fda_fast.errors import InputError
from fda_fast.job import Job, assemble, choose_device, prepare
from fda_fast.output import check_room, disk_bytes, keeps_layers, written_dtype
from fda_fast.resources import Resources
from fda_fast.settings import requested_scope


@dataclass(frozen=True)
class PlanRow:
    """One layer of a plan.

    Attributes:
        layer: its name.
        kind: its class.
        parameters: number of them.
        anchors: shape of one expert's anchors, [n, T, d] or [n, d].
        memory_bytes: what working on this layer takes, all experts together.
        gflop_per_step: operations of one construction step, all experts together, in 10^9.
        seconds: computing on the layer.
        side_seconds: reading, checking and saving it, which goes on beside the computation.
    """

    layer: str
    kind: str
    parameters: int
    anchors: tuple[int, ...]
    memory_bytes: int
    gflop_per_step: float
    seconds: float
    side_seconds: float


@dataclass(frozen=True)
class Plan:
    """A merge, checked and estimated.

    Attributes:
        job: the merge.
        rows: one per layer.
        limits: how it will keep within its memory, and the peak of the process in bytes.
        disk_bytes: what the output takes, and the work on the way to it.
        read_bytes, written_bytes: of the inputs and of the model.
        opening_seconds: before the first layer.
        write_seconds: after the last one.
        seconds: from beginning to end.
        speed: what the times were made with.
    """

    job: Job
    rows: list[PlanRow]
    limits: Limits
    disk_bytes: int
    read_bytes: int
    written_bytes: int
    opening_seconds: float
    write_seconds: float
    seconds: float
    speed: Speed

    @property
    def memory_bytes(self) -> int:
        """Peak of the host's memory, the program itself included."""
        return self.limits.memory


def plan_merge(
    config: MergeConfig,
    output: Path | None = None,
    resources: Resources | None = None,
    *,
    speed: Speed | None = None,
) -> Plan:
    """Check a merge as ``merge`` would, and estimate it.

    Args:
        config: the merge.
        output: the folder to write, to check it and its disk too; None leaves that out.
        resources: device and limits.
        speed: of an earlier calibration; None measures it.

    Raises:
        InputError: anything wrong with the inputs, the output or the limits.

    Cost: headers, a few tensors of every expert, and ``calibrate``. Models of the Hub that are not
    in its cache stay there: their headers are fetched, not their weights.
    """
    from fda_fast.checkpoints.identity import check_differs
    from fda_fast.checkpoints.outputs import check_output
    from fda_fast.checkpoints.remote import RemoteCheckpoint, remote_notes

    begun = time.monotonic()
    where = resources or Resources()
    if output is not None:
        check_output(Path(output).absolute())
    job = prepare(config, where.device, download=False)
    if output is not None:
        check_room(job, Path(output).absolute(), "merge")
    job.notes += remote_notes([job.base, *(view.expert for view in job.experts.values())])
    for view in job.experts.values():
        if not any(isinstance(one, RemoteCheckpoint) for one in (view.base, view.expert)):
            check_differs(view, job.layout)
    limits = choose_limits(job, where.max_memory, where.max_gpu_memory)
    job.identity("merge")
    opening = time.monotonic() - begun
    return plan_job(job, limits, opening, speed or _calibrated(job, limits, output))


def plan_config(
    path: Path,
    parameters: Mapping[str, Any],
    *,
    experts: int = 2,
    output: Path | None = None,
    resources: Resources | None = None,
    dtype: str | None = None,
    speed: Speed | None = None,
) -> Plan:
    """Estimate a merge of models that need not exist: from a transformers config.json.

    Args:
        path: the config, or a folder with one.
        parameters: as in a configuration.
        experts: how many fine-tunes of it.
        output: the folder to write, as in ``plan_merge``.
        resources: device and limits.
        dtype: of the written model; default: the config's.
        speed: of an earlier calibration; None measures it.

    Raises:
        InputError: a config of no known model; an output or limits that cannot be.
    """
    from fda_fast.checkpoints.outputs import check_output

    if output is not None:
        check_output(Path(output).absolute())
    job = describe(path, parameters, experts=experts, device=(resources or Resources()).device,
                   dtype=dtype)  # fmt: skip
    if output is not None:
        check_room(job, Path(output).absolute(), "merge")
    where = resources or Resources()
    limits = choose_limits(job, where.max_memory, where.max_gpu_memory)
    return plan_job(job, limits, 0.0, speed or _calibrated(job, limits, output))


def describe(
    path: Path,
    parameters: Mapping[str, Any],
    *,
    experts: int = 2,
    device: str = "auto",
    dtype: str | None = None,
) -> Job:
    """The job of a base model and experts that exist as one config.json alone.

    Args:
        path, parameters, experts, dtype: as ``plan_config``.
        device: where layers would be computed.
    """
    from fda_fast.checkpoints.align import match_expert
    from fda_fast.checkpoints.described import DescribedCheckpoint
    from fda_fast.checkpoints.layout import ModelLayout

    if experts < 1:
        raise InputError("experts", expected="at least 1", got=experts)
    names = [f"expert-{number}" for number in range(1, experts + 1)]
    content = {
        "merge_method": "fda",
        "base_model": str(path),
        "models": [{"model": name} for name in names],
        "parameters": dict(parameters),
        "out_dtype": dtype,
    }
    config = parse(content, where="plan")
    base = DescribedCheckpoint(path)
    layout = ModelLayout.from_checkpoint(base, scope=requested_scope(config.parameters))
    views = {
        name: match_expert(base, DescribedCheckpoint(path, f"expert {name}"), layout)
        for name in names
    }
    return assemble(config, base, views, layout, choose_device(device))


def is_model_config(path: Path) -> bool:
    """Whether a path is a model's config.json, or a folder with one, rather than a merge."""
    if path.is_dir():
        return (path / "config.json").is_file()
    if path.suffix != ".json":
        return False
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "merge_method" not in content


def plan_path(
    path: Path,
    output: Path | None,
    parameters: Mapping[str, Any],
    *,
    experts: int | None = None,
    resources: Resources | None = None,
) -> Plan:
    """``plan_config`` of a model's config, ``plan_merge`` of a merge's configuration.

    Raises:
        InputError: as these; a number of experts beside a configuration, which names them.
    """
    if is_model_config(path):
        count = 2 if experts is None else experts
        return plan_config(path, parameters, experts=count, output=output, resources=resources)
    config = load(path, parameters)
    if experts is not None:
        raise InputError(
            "--experts",
            expected="a model's config.json, or its folder, with it",
            got=str(path),
            fix="A merge's configuration names its experts.",
        )
    return plan_merge(config, output, resources)


def plan_job(job: Job, limits: Limits, opening: float, speed: Speed) -> Plan:
    """The plan of a job that is open and checked.

    Args:
        job: the merge.
        limits: from ``choose_limits``.
        opening: seconds that opening it took.
        speed: from ``calibrate``.
    """
    asked = replace(workload(job), part=limits.part)
    rows = [_row(job, spec, asked, speed, limits) for spec in job.layers]
    sizes = {name: _written(job, name) for name in job.base.names if name not in job.layout.tied}
    written = sum(sizes.values())
    inside = {name for spec in job.layers for name in spec.parameters.values()}
    again = sum(estimate.FLOAT * spec.numel for spec in job.layers) if keeps_layers(job) else 0
    outside = sum(job.base.names[name].nbytes for name in sizes if name not in inside)
    write = written / speed.write + (again + outside) / speed.read
    seconds = opening + _layers_seconds(rows, limits.overlap, job.device) + write
    read = job.base.nbytes + sum(view.expert.nbytes for view in job.experts.values())
    return Plan(
        job,
        rows,
        limits,
        disk_bytes(job, "merge"),
        read,
        written,
        opening,
        write,
        seconds,
        speed,
    )


def _calibrated(job: Job, limits: Limits, output: Path | None) -> Speed:
    if job.settings.optimises:
        return calibrate(job, replace(workload(job), part=limits.part), output)
    return Speed("", 0, 0, 0, 0, 0, 0, ASSUMED_READ, ASSUMED_WRITE, True, True, 0)


def _written(job: Job, name: str) -> int:
    info, dtype = job.base.names[name], written_dtype(job)
    wider = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
    return info.numel * wider.itemsize


def _row(job: Job, spec: Any, asked: estimate.Workload, speed: Speed, limits: Limits) -> PlanRow:
    precision = job.settings.precision if job.device.type == "cuda" else None
    memory = estimate.layer_memory(spec, asked, group=limits.batch, gpu_precision=precision)
    step = estimate.construct_flop(spec, asked) / 1e9 if asked.optimises else 0.0
    seconds = 0.0
    if asked.optimises:
        seconds += asked.tasks * spec.numel * speed.construct_setup
        seconds += asked.steps * step * speed.construct_step
        seconds += spec.numel * speed.adapt_setup
        seconds += asked.epochs * estimate.adapt_flop(spec, asked) / 1e9 * speed.adapt_step
        if asked.starts:
            work = sum(start_flop(shape, asked.tasks) for shape in spec.shapes.values())
            seconds += work * speed.start
    layer = estimate.parameter_bytes(spec)
    stored = sum(job.base.names[name].nbytes for name in spec.parameters.values())
    side = (1 + asked.tasks) * (layer * speed.prepare + stored / speed.read)
    side += layer / speed.write
    shape = job.settings.construct.shape(spec.width) if asked.optimises else ()
    return PlanRow(
        spec.name,
        spec.kind,
        spec.numel,
        tuple(shape),
        memory.total(overlap=False),
        step,
        seconds,
        side,
    )


def _layers_seconds(rows: list[PlanRow], overlap: bool, device: torch.device) -> float:
    compute, side = sum(row.seconds for row in rows), sum(row.side_seconds for row in rows)
    if not overlap or not rows:
        return compute + side
    # On a processor whose cores all compute, checks and hashes beside it take their time from it.
    spare = device.type == "cuda" or torch.get_num_threads() < len(os.sched_getaffinity(0))
    if not spare:
        return compute + side
    return rows[0].side_seconds + sum(max(row.seconds, row.side_seconds) for row in rows)
