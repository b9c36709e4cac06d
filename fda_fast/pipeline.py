"""The layers of a merge one after the other: read, construct, adapt, save, free."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fda_fast.activations import extra_anchors
from fda_fast.anchors import Anchors
from fda_fast.checkpoints.align import check_finite
from fda_fast.checkpoints.hashing import hash_tensors
from fda_fast.checkpoints.layout import LayerSpec
from fda_fast.errors import InputError
from fda_fast.job import Job, groups_of
from fda_fast.layerwork import (
    LayerInput,
    LayerResult,
    TaskResult,
    adapt_layer,
    check_origin,
    construct_layer,
    is_unchanged,
)
from fda_fast.progress import Display
from fda_fast.startpoint import adaptation_start, merged_tensor
from fda_fast.work import WorkDirectory, file_name, snapshot_key


def read_layer(job: Job, index: int) -> LayerInput:
    """One layer of the base and of every expert, each byte read once, checked and placed.

    Raises:
        InputError: NaN or Inf, by tensor name.
    """
    spec = job.layers[index]
    stored = list(spec.tensors.values())
    base = job.base.read(stored)
    for name, tensor in base.items():
        check_finite(name, tensor, job.base.role)
    pretrained = job.layout.build(spec, _local(spec, base)).to(job.device)
    finetuned = {}
    for task, view in job.experts.items():
        tensors = view.read(stored, pretrained=base)
        finetuned[task] = job.layout.build(spec, _local(spec, tensors)).to(job.device)
    unchanged = {task for task, layer in finetuned.items() if is_unchanged(pretrained, layer)}
    hashes = {"": hash_tensors(dict(pretrained.named_parameters()))}
    hashes |= {task: hash_tensors(dict(m.named_parameters())) for task, m in finetuned.items()}
    return LayerInput(
        spec.name, index, spec.width, pretrained, finetuned, frozenset(unchanged), hashes
    )


def _local(spec: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {local: tensors[name] for local, name in spec.tensors.items()}


def process_layer(
    job: Job,
    work: WorkDirectory,
    index: int,
    display: Display,
    *,
    mode: str = "merge",
    source: Path | None = None,
) -> LayerResult:
    """Bring one layer to its end, or take it as an earlier run left it.

    Args:
        job: the merge.
        work: where finished work is.
        index: of the layer.
        display: shows progress.
        mode: "merge", "construct" to stop after the anchors, or "adapt" to take all of them
            from ``source``.
        source: folder of finished anchors to use; with "merge" those missing there are
            constructed.
    """
    spec = job.layers[index]
    if work.is_finished(spec.name):
        return LayerResult.from_record(work.load_record(spec.name))
    result = LayerResult(spec.name)
    tensors: Mapping[str, Tensor]
    if job.settings.optimises:
        begun = time.monotonic()
        inputs = read_layer(job, index)
        result.seconds["read"] = time.monotonic() - begun
        try:
            tensors = _optimise(job, work, inputs, display, mode, source, result)
        except RuntimeError as error:
            error.add_note(f"(layer {spec.name})")
            raise
    else:
        begun = time.monotonic()
        tensors = {name: merged_tensor(job, name) for name in spec.parameters.values()}
        result.seconds["start"] = time.monotonic() - begun
    begun = time.monotonic()
    work.save_layer(spec.name, tensors, result.as_record())
    result.seconds["save"] = time.monotonic() - begun
    return result


def _optimise(
    job: Job,
    work: WorkDirectory,
    inputs: LayerInput,
    display: Display,
    mode: str,
    source: Path | None,
    result: LayerResult,
) -> dict[str, Tensor]:
    spec = job.layers[inputs.index]
    if len(inputs.unchanged) == len(job.experts):
        # Such as an expert of a mixture that no training text was routed to: nothing to do.
        nothing = dict.fromkeys(spec.parameters, 0.0)
        result.tasks = {task: TaskResult(float(len(nothing)), nothing) for task in job.experts}
        return {} if mode == "construct" else _stored(spec, inputs.pretrained)
    begun = time.monotonic()
    found = {} if source is None else load_anchors(source, inputs, every=mode == "adapt")
    missing = [task for task in job.experts if task not in found]
    if missing:
        paths = {task: work.anchors_path(task, spec.name) for task in missing}
        groups = groups_of(missing, work.batch)
        found |= construct_layer(inputs, job.settings, groups, paths, display)
    anchors = {task: found[task] for task in job.experts}
    result.seconds["construct"] = time.monotonic() - begun
    result.tasks = {task: TaskResult.of(found) for task, found in anchors.items()}
    if mode == "construct":
        return {}
    begun = time.monotonic()
    start = adaptation_start(job, spec, inputs)
    result.seconds["start"] = time.monotonic() - begun
    begun = time.monotonic()
    extra = extra_anchors(job.extra_anchors, inputs, anchors) if job.extra_anchors else None
    adapted = adapt_layer(inputs, anchors, start, job.settings, display, extra)
    history = adapted.history.tolist()
    result.adaptation = history[0], history[-1]
    result.snapshots = {epoch: history[epoch - 1] for epoch in job.settings.adapt.snapshots}
    result.seconds["adapt"] = time.monotonic() - begun
    tensors = _stored(spec, adapted.layer)
    for epoch, layer in adapted.snapshots.items():
        tensors |= {snapshot_key(k, epoch): t for k, t in _stored(spec, layer).items()}
    return tensors


def _stored(spec: LayerSpec, layer: nn.Module) -> dict[str, Tensor]:
    """A layer's parameters by their names in the base."""
    return {spec.parameters[name]: p.detach() for name, p in layer.named_parameters()}


def load_anchors(source: Path, inputs: LayerInput, *, every: bool = True) -> dict[str, Anchors]:
    """Finished anchors of the tasks of a layer, checked against the layer.

    Args:
        source: a folder with <task>/<layer>.safetensors.
        inputs: the layer.
        every: refuse a folder without those of some task, rather than leave the task out.

    Raises:
        InputError: a missing file, or anchors of another layer, width or checkpoint.
    """
    found = {}
    for task in inputs.finetuned:
        path = source / file_name(task) / f"{file_name(inputs.name)}.safetensors"
        if not path.is_file():
            if not every:
                continue
            raise InputError(
                f"no anchors of expert {task} for layer {inputs.name}",
                expected=str(path),
                got=", ".join(sorted(p.name for p in source.iterdir())) or "an empty folder",
                fix="Folders are named by the experts, files by the layers.",
            )
        anchors = Anchors.load(path)
        if anchors.tensor.shape[-1] != inputs.width:
            raise InputError(
                f"anchors file {path}: width",
                expected=inputs.width,
                got=anchors.tensor.shape[-1],
            )
        check_origin(anchors, inputs, task, path)
        found[task] = anchors
    return found
