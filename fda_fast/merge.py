"""merge(): from checkpoints to one merged checkpoint, layer by layer, resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fda_fast.budget import peak
from fda_fast.config import MergeConfig, parse
from fda_fast.dtypes import dtype_name
from fda_fast.errors import InputError
from fda_fast.kept import explained
from fda_fast.layerwork import LayerResult
from fda_fast.progress import display
from fda_fast.resources import Resources, device_list
from fda_fast.work import WorkDirectory

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
    from fda_fast.stages import Task, check_batch, do_layers, total_seconds, unfinished, write
    from fda_fast.startscale import resolve_scale

    begun = time.monotonic()
    where = resources or Resources.of(device)
    target = Path(os.path.abspath(Path(output).expanduser()))
    check_output(target)
    shared = len(device_list(where.device)) > 1
    if shared:
        from fda_fast.devices import share

        share(config, target, where, mode=mode, anchors=anchors, restart=restart, progress=progress)
        where = replace(where, device=device_list(where.device)[0])
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
        shard = None if where.shard is None else str(where.shard)
        with (
            WorkDirectory(target) as work,
            display(progress) as shown,
            explained(work, restart=restart),
        ):
            identity = job.identity(mode, extra)
            work.open(
                identity,
                batch=limits.batch,
                part=limits.part,
                restart=restart and not shared,
                shard=shard,
            )
            check_batch(work, limits)
            resolve_scale(job, work)
            for note in job.notes:
                shown.note(note)
            task = Task(job, work, shown, limits, where, mode, anchors)
            layers, waited = do_layers(task)
            seconds = total_seconds(layers) | {"wait": waited}
            if where.shard is None:
                writing = time.monotonic()
                write(task, target, layers, keep_anchors)
                seconds["write"] = time.monotonic() - writing
                work.remove()
            missing = 0 if where.shard is None else len(unfinished(job, work))
    finally:
        job.close()
    seconds["total"] = time.monotonic() - begun
    settings = job.settings.as_dict()
    return Report(target, layers, seconds, job.notes, settings, peak(), missing)


def _folder_identity(folder: Path) -> dict[str, str]:
    from fda_fast.job import fingerprint

    if not folder.is_dir():
        raise InputError(f"anchors {folder}", expected="a folder that `construct` wrote")
    files = sorted(folder.glob("*/*.safetensors"))
    return {str(path.relative_to(folder)): fingerprint(path) for path in files}
