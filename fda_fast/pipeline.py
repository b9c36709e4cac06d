"""The layers of a merge one after the other: read, construct, adapt, save, free."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

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
from fda_fast.work import WorkDirectory, file_name


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
        mode: "merge", or "construct" to stop after the anchors.
        source: folder of finished anchors to adapt to, instead of constructing them.
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
    begun = time.monotonic()
    if source is None:
        paths = {task: work.anchors_path(task, spec.name) for task in job.experts}
        groups = groups_of(list(job.experts), work.batch)
        anchors = construct_layer(inputs, job.settings, groups, paths, display)
    else:
        anchors = load_anchors(source, inputs)
    result.seconds["construct"] = time.monotonic() - begun
    result.tasks = {
        task: TaskResult(found.loss, dict(found.cosines)) for task, found in anchors.items()
    }
    if mode == "construct":
        return {}
    if len(inputs.unchanged) == len(job.experts):
        parameters = dict(inputs.pretrained.named_parameters())
        return {spec.parameters[name]: p.detach() for name, p in parameters.items()}
    begun = time.monotonic()
    start = adaptation_start(job, spec, inputs)
    result.seconds["start"] = time.monotonic() - begun
    begun = time.monotonic()
    layer, result.adaptation = adapt_layer(inputs, anchors, start, job.settings, display)
    result.seconds["adapt"] = time.monotonic() - begun
    return {spec.parameters[name]: p.detach() for name, p in layer.named_parameters()}


def load_anchors(source: Path, inputs: LayerInput) -> dict[str, Anchors]:
    """Finished anchors of every task of a layer, checked against the layer.

    Args:
        source: a folder with <task>/<layer>.safetensors.
        inputs: the layer.

    Raises:
        InputError: a missing file, or anchors of another layer, width or checkpoint.
    """
    found = {}
    for task in inputs.finetuned:
        path = source / file_name(task) / f"{file_name(inputs.name)}.safetensors"
        if not path.is_file():
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
