"""merge(): from checkpoints to one merged checkpoint, layer by layer, resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from fda_fast.budget import Limits, peak
from fda_fast.config import MergeConfig, parse
from fda_fast.dtypes import dtype_name
from fda_fast.errors import InputError
from fda_fast.layerwork import LayerResult
from fda_fast.progress import Display, display
from fda_fast.resources import Resources, device_list
from fda_fast.work import WorkDirectory, explained

if TYPE_CHECKING:
    from fda_fast.job import Job

Mode = Literal["merge", "construct", "adapt"]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Report:
    """What a merge did.

    Attributes:
        output: the folder written.
        layers: results per layer: losses and cosines by task, adaptation loss, times.
        seconds: time by phase in this run: read, construct, start, adapt, save, write, total;
            reading and saving go on beside the rest, and "wait" is what was waited for them.
        notes: what the user should know.
        settings: every setting, after presets.
        peak_memory: most bytes of memory that the process has had.
        unfinished: layers that other shards have yet to finish.
    """

    output: Path
    layers: list[LayerResult]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    peak_memory: int = 0
    unfinished: int = 0


@overload
def merge(
    pretrained: PathLike,
    experts: Sequence[PathLike] | Mapping[str, PathLike],
    output: PathLike,
    **settings: Any,
) -> Report: ...
@overload
def merge(
    pretrained: nn.Module, experts: Sequence[Any] | Mapping[str, Any], **settings: Any
) -> nn.Module: ...
@overload
def merge(
    pretrained: Mapping[str, Tensor],
    experts: Sequence[Any] | Mapping[str, Any],
    *,
    model: Any,
    **settings: Any,
) -> dict[str, Tensor]: ...
def merge(
    pretrained: PathLike | nn.Module | Mapping[str, Tensor],
    experts: Sequence[Any] | Mapping[str, Any],
    output: PathLike | None = None,
    *,
    model: Any = None,
    start: str = "pretrained",
    method: str = "fda",
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str = "auto",
    anchors_from: PathLike | None = None,
    out_lora: Mapping[str, int] | None = None,
    keep_anchors: bool = False,
    restart: bool = False,
    progress: bool = True,
    max_memory: str | int | None = None,
    max_gpu_memory: str | int | None = None,
    shard: str | None = None,
    assemble: bool = False,
    ray: str | None = None,
    **parameters: Any,
) -> Report | nn.Module | dict[str, Tensor]:
    """Merge fine-tuned models into one: folders on disk, or models in memory.

    With a path as ``pretrained`` the merged checkpoint is written to ``output``. With a module or
    a state dict it is returned, and nothing that was passed in is modified: see
    ``memory_merge.merge_in_memory``, which also gives the report.

    Per layer: read it from the base and every expert, construct anchors for every expert, adapt
    the layer to all anchors, save it. Then everything is written as one checkpoint that
    ``from_pretrained`` loads. If the process dies, the same call goes on after the last finished
    layer (and anchors) and writes the same bytes; unfinished work is in ``<output>.fda-work``.

    Args:
        pretrained: the base model's folder; or an ``nn.Module``, or a state dict.
        experts: folders of fine-tuned models or PEFT adapters; in memory also modules, PEFT models
            and state dicts. A mapping names them.
        output: folder to write: new, or empty. None in memory.
        model: with a state dict, the module or transformers config it belongs to.
        start: where adaptation begins: "pretrained" (all weights are trained), or
            "task_arithmetic", "tsv", "wudi" (elementwise coefficients of task vectors are).
        method: "fda", or a starting point alone: "task_arithmetic", "tsv", "wudi".
        dtype: of the written weights: "float32", "bfloat16", "float16", or torch's; default the
            base's. ``torch_dtype`` is its deprecated name.
        device: "auto", "cpu", "cuda", "cuda:N".
        anchors_from: folder of finished anchors, such as ``keep_anchors`` leaves: they are used,
            and only those of experts missing there are constructed. Anchors do not depend on
            ``start``, so one set serves every start.
        out_lora: {"rank": r} also writes merged - base as a LoRA adapter, in ``output/lora``.
        keep_anchors: leave the anchors in ``output/anchors/<expert>/<layer>.safetensors``.
        restart: throw away the unfinished work of an earlier, different merge.
        progress: show what is going on, on stderr.
        **parameters: any field of ``config.Parameters``: preset, steps, lr, init, anchors, tokens,
            epochs, adapt_lr, batch_size, scaling, engine, precision, scope, seed, outside, ...

    Returns:
        ``Report``; in memory the merged module, or state dict.

    Raises:
        InputError: anything wrong with the input; nothing is written then.
        OSError: the disk is full, a file cannot be written; finished work is kept.

    Memory: one layer of all models in float32 and its anchors.
    Source: FDA, arXiv 2510.21223v1; published settings are presets (``fda_fast.presets``).
    """
    dtype = dtype_name(dtype, torch_dtype)
    if not isinstance(pretrained, str | os.PathLike):
        from fda_fast.memory_merge import merge_in_memory

        _refuse(
            output=output,
            keep_anchors=keep_anchors,
            restart=restart,
            out_lora=out_lora,
            max_memory=max_memory,
            max_gpu_memory=max_gpu_memory,
            shard=shard,
            assemble=assemble,
            ray=ray,
        )
        return merge_in_memory(
            pretrained,
            experts,
            model=model,
            start=start,
            method=method,
            dtype=dtype,
            device=device,
            anchors_from=anchors_from,
            progress=progress,
            **parameters,
        ).model
    if output is None or model is not None:
        raise InputError(
            "merge() of folders",
            expected="output, and no model",
            got="no output" if output is None else "model",
        )
    pairs = experts.items() if isinstance(experts, Mapping) else [(None, e) for e in experts]
    for _, expert in pairs:
        if not isinstance(expert, str | os.PathLike):
            raise InputError(
                "experts",
                expected="paths, as the pretrained model is one",
                got=type(expert).__name__,
            )
    models = [{"model": os.fspath(path), "name": name} for name, path in pairs]
    content: dict[str, Any] = {
        "merge_method": method,
        "base_model": os.fspath(pretrained),
        "models": models,
        "parameters": parameters if method != "fda" else {"start": start, **parameters},
        "out_dtype": dtype,
        "out_lora": out_lora,
    }
    return run(
        parse(content, where="merge()"),
        output,
        anchors=None if anchors_from is None else Path(anchors_from),
        device=device,
        keep_anchors=keep_anchors,
        restart=restart,
        progress=progress,
        resources=Resources.of(
            device,
            max_memory=max_memory,
            max_gpu_memory=max_gpu_memory,
            shard=shard,
            assemble=assemble,
            ray=ray,
        ),
    )


def _refuse(**options: object) -> None:
    """Refuse the options of merges on disk."""
    given = [name for name, value in options.items() if value]
    if given:
        raise InputError(
            f"{given[0]} has no meaning for models in memory",
            fix="Save the module that merge() returns, or give folders.",
        )


def run(
    config: MergeConfig,
    output: PathLike,
    *,
    mode: Mode = "merge",
    anchors: Path | None = None,
    device: str = "auto",
    keep_anchors: bool = False,
    restart: bool = False,
    progress: bool = True,
    resources: Resources | None = None,
) -> Report:
    """Do what a configuration says; ``merge`` and the command line end here.

    Args:
        config: from ``config.load`` or ``config.parse``.
        output: folder to write: new, or empty.
        mode: "merge", "construct" (anchors only) or "adapt" (to finished ``anchors``).
        anchors: folder of finished anchors: of every expert with mode "adapt", of some or all
            with mode "merge", which constructs the others.
        device, keep_anchors, restart, progress: as ``merge``.
        resources: where to run and how much to take; replaces ``device``.

    Raises:
        InputError, OSError: as ``merge``.
    """
    # Not at the top: they load transformers, which `import fda_fast` should not wait for.
    from fda_fast.activations import check_extra_anchors
    from fda_fast.budget import choose_limits, enforce
    from fda_fast.checkpoints.identity import check_differs
    from fda_fast.checkpoints.outputs import check_output
    from fda_fast.job import prepare
    from fda_fast.output import check_room
    from fda_fast.reuse import reuse_notes
    from fda_fast.startscale import resolve_scale

    begun = time.monotonic()
    where = resources or Resources.of(device)
    target = Path(os.path.abspath(Path(output).expanduser()))
    check_output(target)
    if len(device_list(where.device)) > 1:
        from fda_fast.devices import share

        share(config, target, where, mode=mode, anchors=anchors, restart=restart, progress=progress)
        where, restart = replace(where, device=device_list(where.device)[0]), False
    job = prepare(config, where.device)
    try:
        if mode != "merge" and not job.settings.optimises:
            raise InputError(f"merge_method {job.settings.method} has no anchors")
        check_room(job, target, mode)
        extra = {}
        if anchors is not None:
            extra["anchors"] = _folder_identity(anchors)
            job.notes += reuse_notes(job, anchors)
        if job.extra_anchors is not None:
            check_extra_anchors(job.extra_anchors, job.experts, [s.name for s in job.layers])
            extra["extra_anchors"] = _folder_identity(job.extra_anchors)
        for view in job.experts.values():
            check_differs(view, job.layout)
        limits = choose_limits(job, where.max_memory, where.max_gpu_memory)
        enforce(job, where.max_memory, where.max_gpu_memory)
        part = None if where.shard is None else str(where.shard)
        with WorkDirectory(target) as work, display(progress) as shown, explained(work):
            identity = job.identity(mode, extra)
            work.open(identity, batch=limits.batch, restart=restart, shard=part)
            _check_batch(work, limits)
            resolve_scale(job, work)
            for note in job.notes:
                shown.note(note)
            task = _Task(job, work, shown, limits, where, mode, anchors)
            layers, waited = _layers(task)
            seconds = _total(layers) | {"wait": waited}
            if where.shard is None:
                writing = time.monotonic()
                _write(task, target, layers, keep_anchors)
                seconds["write"] = time.monotonic() - writing
                work.remove()
            unfinished = 0 if where.shard is None else len(_pending(job, work))
    finally:
        job.close()
    seconds["total"] = time.monotonic() - begun
    settings = job.settings.as_dict()
    return Report(target, layers, seconds, job.notes, settings, peak(), unfinished)


@dataclass(frozen=True)
class _Task:
    """A merge under way."""

    job: Job
    work: WorkDirectory
    shown: Display
    limits: Limits
    resources: Resources
    mode: Mode
    anchors: Path | None


def _check_batch(work: WorkDirectory, limits: Limits) -> None:
    if work.batch > limits.batch:
        raise InputError(
            f"{work.path} was begun with {work.batch} experts in a batch, for which there is no "
            "memory now",
            expected=f"room for {work.batch}",
            got=f"room for {limits.batch}",
            fix="Free or allow as much as then, or use --restart.",
        )


def _pending(job: Job, work: WorkDirectory) -> list[int]:
    """Numbers of the layers that are not finished."""
    from fda_fast.output import keeps_layers

    if not keeps_layers(job):
        return []
    return [i for i, spec in enumerate(job.layers) if not work.is_finished(spec.name)]


def _layers(task: _Task) -> tuple[list[LayerResult], float]:
    """Results of the layers that are finished, and the seconds that computing stood still."""
    from fda_fast.output import keeps_layers
    from fda_fast.pipeline import process_layers

    job, work, resources = task.job, task.work, task.resources
    if not keeps_layers(job):
        if resources.shard is not None:
            raise InputError(f"method {job.settings.method} has no work worth sharing out")
        return [LayerResult(spec.name) for spec in job.layers], 0.0
    pending = _pending(job, work)
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


def _write(task: _Task, target: Path, layers: list[LayerResult], keep_anchors: bool) -> None:
    from fda_fast.output import publish_anchors, write_models

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


def _total(layers: list[LayerResult]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for layer in layers:
        for phase, spent in layer.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    return seconds


def _folder_identity(folder: Path) -> dict[str, str]:
    from fda_fast.job import fingerprint

    if not folder.is_dir():
        raise InputError(f"anchors {folder}", expected="a folder that `construct` wrote")
    files = sorted(folder.glob("*/*.safetensors"))
    return {str(path.relative_to(folder)): fingerprint(path) for path in files}
