"""Writing what a merge came to: the model, its card and report, or the anchors alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fda_fast.checkpoints.align import check_finite
from fda_fast.checkpoints.card import hub_name, model_card
from fda_fast.checkpoints.outputs import check_disk, sync_directory
from fda_fast.checkpoints.writer import MergedWriter
from fda_fast.conditional import plain_setting
from fda_fast.job import Job
from fda_fast.layerwork import LayerResult
from fda_fast.lora import LoraWriter
from fda_fast.machine import here
from fda_fast.progress import Display
from fda_fast.startpoint import merged_tensor
from fda_fast.stream import overlapped
from fda_fast.times import Times
from fda_fast.work import WorkDirectory, file_name

REPORT = "fda_report.json"
METHODS = {
    "fda": "Functional Dual Anchors",
    "task_arithmetic": "Task Arithmetic",
    "tsv": "TSV-M (Task Singular Vectors)",
    "wudi": "WUDI",
    "pretrained": "the pretrained model",
}


def written_dtype(job: Job) -> torch.dtype | None:
    """The output's dtype, None for the base's own."""
    dtype: torch.dtype | None = getattr(torch, job.settings.dtype) if job.settings.dtype else None
    return dtype


def check_room(job: Job, target: Path, mode: str) -> int:
    """Refuse a merge that the disk has no room for, counting its work directory too.

    Args:
        job: the merge.
        target: the output.
        mode: "merge", "construct" or "adapt".

    Returns:
        The bytes needed.

    Raises:
        InputError: with the bytes needed and free.
    """
    needed = disk_bytes(job, mode)
    check_disk(target, needed)
    return needed


def disk_bytes(job: Job, mode: str) -> int:
    """Bytes of the output and of the work on the way to it."""
    needed, models = 0, 1
    if job.settings.optimises:
        models = max(1, len(job.settings.adapt.snapshots))
    if mode != "construct":
        dtype = written_dtype(job)
        for name, info in job.base.names.items():
            if name in job.layout.tied:
                continue
            float_here = info.dtype.is_floating_point and dtype is not None
            needed += info.numel * (dtype.itemsize if float_here and dtype else info.dtype.itemsize)
        if keeps_layers(job):
            needed += sum(4 * spec.numel for spec in job.layers)
        needed *= models
    if mode != "adapt" and job.settings.optimises:
        rows = job.settings.construct.rows
        needed += sum(4 * rows * spec.width for spec in job.layers) * len(job.experts)
    return needed


def keeps_layers(job: Job) -> bool:
    """Whether finished layers go through the work directory; sums are simply computed again."""
    return job.settings.method != "task_arithmetic"


def write_models(
    job: Job,
    work: WorkDirectory,
    target: Path,
    layers: Sequence[LayerResult],
    *,
    display: Display,
    keep_anchors: bool = False,
    kept: Sequence[Path] = (),
    overlap: bool = True,
) -> None:
    """Write the merged checkpoint, or one for each number of epochs asked for.

    The second case gives folders ``target/epochs-10`` and so on, each with the same files that a
    merge with so many epochs writes. The output appears complete or not at all.

    Args:
        job: the merge.
        work: with every layer finished.
        target: the output folder.
        layers: results, for the report.
        display: shows how many tensors are written.
        keep_anchors: copy the anchors to ``target/anchors``.
        kept: folders of anchors that were used beside those in ``work``.
        overlap: as ``write_model``.

    Raises:
        InputError, OSError: as ``write_model``.
    """
    snapshots = job.settings.adapt.snapshots if job.settings.optimises else ()
    folders = [*kept, work.path / "anchors"] if keep_anchors and job.settings.optimises else []
    if not snapshots:
        write_model(job, work, target, layers, display=display, anchors=folders, overlap=overlap)
        return
    building = work.path / "output"
    shutil.rmtree(building, ignore_errors=True)
    for epochs in snapshots:
        write_model(
            _ended_after(job, epochs),
            work,
            building / f"epochs-{epochs}",
            [layer.at(epochs) for layer in layers],
            display=display,
            snapshot=epochs,
            overlap=overlap,
        )
    _copy_anchors(folders, building, job)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        target.rmdir()  # empty, or this fails: never overwrite
    os.rename(building, target)
    sync_directory(target.parent)


def _ended_after(job: Job, epochs: int) -> Job:
    """The merge that asks for this number of epochs alone."""
    adapt = dataclasses.replace(job.settings.adapt, epochs=epochs, snapshots=())
    parameters = job.config.parameters.model_copy(update={"epochs": epochs})
    return dataclasses.replace(
        job,
        settings=dataclasses.replace(job.settings, adapt=adapt),
        config=job.config.model_copy(update={"parameters": parameters}),
    )


def _copy_anchors(folders: Sequence[Path], target: Path, job: Job) -> None:
    """Anchors of this merge's experts and layers from several folders; the last ones stand."""
    names = [f"{file_name(spec.name)}.safetensors" for spec in job.layers]
    for folder in folders:
        for task in job.experts:
            for name in names:
                source = folder / file_name(task) / name
                if source.is_file():
                    copy = target / "anchors" / file_name(task) / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, copy)


def write_model(
    job: Job,
    work: WorkDirectory,
    target: Path,
    layers: Sequence[LayerResult],
    *,
    display: Display,
    anchors: Sequence[Path] = (),
    snapshot: int | None = None,
    overlap: bool = True,
) -> None:
    """Write the merged checkpoint; it appears complete or not at all.

    Args:
        job: the merge.
        work: with every layer finished.
        target: the output folder.
        layers: results, for the report.
        display: shows how many tensors are written.
        anchors: folders to copy the anchors to ``target/anchors`` from.
        snapshot: take the layers as they were after so many epochs.
        overlap: read the next tensor and write the last one meanwhile.

    Raises:
        InputError: NaN or Inf outside the layers; values that the written dtype cannot hold.
        OSError: as the operating system says.
    """
    begun = time.monotonic()
    scratch = work.path / ("output" if snapshot is None else "output.partial")
    owner = {name: spec.name for spec in job.layers for name in spec.parameters.values()}
    config = _public_config(job)
    adapter = None
    if job.config.out_lora is not None:
        adapter = LoraWriter(job.layout, job.config.out_lora.rank)
    with MergedWriter(target, job.layout, dtype=written_dtype(job), scratch=scratch) as writer:
        display.begin("write", target.name, len(layers) - 1, len(writer.names), [])

        def use(done: int, tensor: Tensor) -> Tensor:
            if adapter is not None:
                adapter.add(writer.names[done], tensor)
            display.on_tensor(done + 1)
            return tensor

        overlapped(
            range(len(writer.names)),
            lambda i: _final(job, work, writer.names[i], owner.get(writer.names[i]), snapshot),
            use,
            lambda i, tensor: writer.add(writer.names[i], tensor),
            overlap=overlap,
        )
        report: dict[str, Any] = {"settings": job.settings.as_dict(), "notes": job.notes}
        report |= job.records
        if adapter is not None:
            report["lora"] = adapter.write(scratch / "lora")
        report["layers"] = [layer.as_record() for layer in layers]
        (scratch / REPORT).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        _copy_anchors(anchors, scratch, job)
        spent = {layer.layer: layer.seconds or work.load_times(layer.layer) for layer in layers}
        Times(spent, time.monotonic() - begun, here(job.device)).save(scratch)
        writer.finish(card=_card(job, config), config_yaml=config)


def publish_anchors(work: WorkDirectory, target: Path) -> None:
    """Let the finished anchors appear as the output folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        target.rmdir()  # empty, or this fails: never overwrite
    os.rename(work.path / "anchors", target)
    sync_directory(target.parent)


def _final(
    job: Job, work: WorkDirectory, name: str, layer: str | None, snapshot: int | None
) -> Tensor:
    if layer is not None and keeps_layers(job):
        return work.load_tensor(layer, name, snapshot)
    merged = job.settings.outside == "start" and job.settings.start != "pretrained"
    if merged or layer is not None:
        return merged_tensor(job, name)
    tensor = job.base.read([name])[name]
    check_finite(name, tensor, job.base.role)
    return tensor


def _card(job: Job, config: str) -> str:
    settings = job.settings
    base = hub_name(job.base)
    method = METHODS[settings.method]
    if settings.optimises:
        method += f" from {METHODS[settings.start]}"
    shown: dict[str, object] = {"start": settings.start, "scope": settings.scope}
    if settings.optimises:
        made, fitted = settings.construct, settings.adapt
        tokens = f" of {made.tokens} tokens" if made.tokens else ""
        scale = f" times {made.scale:g}" if made.init == "gaussian" else ""
        shown |= {
            "preset": settings.preset,
            "anchors": f"{made.anchors}{tokens} per layer and expert, from {made.init}{scale}",
            "construction": f"{made.steps} steps, lr {made.lr:g}, {made.distance}",
            "adaptation": f"{fitted.epochs} epochs, lr {fitted.lr:g}, {fitted.distance}",
            "seed": made.seed,
        }
    title = f"{base} merged with {', '.join(job.experts)}"
    experts = {name: view.expert for name, view in job.experts.items()}
    return model_card(title, job.base, experts, method=method, settings=shown, config_yaml=config)


def _public_config(job: Job) -> str:
    """The configuration as YAML that repeats this merge, with names in place of local paths."""
    given = job.config.parameters.model_dump(exclude_none=True, exclude_defaults=True)
    if "extra_anchors" in given:
        given["extra_anchors"] = Path(given["extra_anchors"]).name
    models: list[dict[str, Any]] = []
    for entry, (name, view) in zip(job.config.models, job.experts.items(), strict=True):
        model: dict[str, Any] = {"model": hub_name(view.expert)}
        if file_name(model["model"].rsplit("/", 1)[-1]) != name:
            model["name"] = name
        if entry.parameters.weight is not None:
            model["parameters"] = {"weight": plain_setting(entry.parameters.weight)}
        models.append(model)
    content: dict[str, Any] = {
        "merge_method": job.config.merge_method,
        "base_model": hub_name(job.base),
        "models": models,
        "parameters": {"preset": job.settings.preset, **given} if job.settings.optimises else given,
        "out_dtype": job.settings.dtype,
        "out_lora": None if job.config.out_lora is None else job.config.out_lora.model_dump(),
    }
    if job.settings.preset.startswith("default-"):
        content["parameters"].pop("preset", None)  # not a name that can be given
    return yaml.safe_dump({k: v for k, v in content.items() if v}, sort_keys=False)
