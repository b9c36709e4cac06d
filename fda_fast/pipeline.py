"""The layers of a merge one after the other: read, construct, adapt, save, free; overlapping."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from fda_fast.activations import extra_anchors
from fda_fast.anchors import Anchors
from fda_fast.checkpoints.align import check_finite
from fda_fast.checkpoints.hashing import hash_tensors
from fda_fast.checkpoints.layout import LayerSpec
from fda_fast.curve import rounded
from fda_fast.errors import InputError
from fda_fast.job import Job, groups_of
from fda_fast.layers.factored import attach_factors
from fda_fast.layerwork import (
    LayerInput,
    LayerResult,
    TaskResult,
    adapt_layer,
    check_origin,
    construct_layer,
    is_unchanged,
)
from fda_fast.ops import memory
from fda_fast.progress import Display
from fda_fast.startpoint import StoredDeltas, adaptation_start, merged_tensors, read_deltas
from fda_fast.stream import overlapped
from fda_fast.upload import Uploader
from fda_fast.work import WorkDirectory, file_name, snapshot_key


def read_layer(
    job: Job, index: int, tasks: Collection[str] | None = None, uploader: Uploader | None = None
) -> LayerInput:
    """One layer of the base and of every expert, each byte read once, checked and placed.

    Args:
        job: the merge.
        index: of the layer.
        tasks: the experts to read; all of them by default.
        uploader: what copies layers to the device; one is made if need be.

    Raises:
        InputError: NaN or Inf, by tensor name.
    """
    spec = job.layers[index]
    stored = list(spec.tensors.values())
    base = job.base.read(stored)
    for name, tensor in base.items():
        check_finite(name, tensor, job.base.role)
    pretrained = job.layout.build(spec, _local(spec, base))
    finetuned = {}
    for task, view in job.experts.items():
        if tasks is None or task in tasks:
            tensors = view.read(stored, pretrained=base)
            finetuned[task] = job.layout.build(spec, _local(spec, tensors))
            factors = view.factors(stored)
            local = {n: factors[b] for n, b in spec.parameters.items() if b in factors}
            attach_factors(finetuned[task], local)
    del base
    unchanged = {task for task, layer in finetuned.items() if is_unchanged(pretrained, layer)}
    hashes = {"": hash_tensors(dict(pretrained.named_parameters()))}
    hashes |= {task: hash_tensors(dict(m.named_parameters())) for task, m in finetuned.items()}
    place = (uploader or Uploader(job.device)).upload
    return LayerInput(
        spec.name,
        index,
        spec.width,
        place(pretrained),
        {task: place(layer) for task, layer in finetuned.items()},
        frozenset(unchanged),
        hashes,
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
        job, work, display, mode, source: as ``process_layers``.
        index: of the layer.
    """
    spec = job.layers[index]
    if not work.is_finished(spec.name):
        done, _ = process_layers(
            job, work, [index], display, mode=mode, source=source, overlap=False
        )
        return done[index]
    return LayerResult.from_record(work.load_record(spec.name))


def process_layers(
    job: Job,
    work: WorkDirectory,
    indices: Sequence[int],
    display: Display,
    *,
    mode: str = "merge",
    source: Path | None = None,
    overlap: bool = True,
) -> tuple[dict[int, LayerResult], float]:
    """Bring layers to their end: the next one is read and the last one saved meanwhile.

    Args:
        job: the merge.
        work: where finished work is and goes.
        indices: of layers that are not finished, in order.
        display: shows progress.
        mode: "merge", "construct" to stop after the anchors, or "adapt" to take all of them
            from ``source``.
        source: folder of finished anchors to use; with "merge" those missing there are
            constructed.
        overlap: False reads, computes and saves one after the other, in less memory.

    Returns:
        Results by index, and the seconds that computing stood still for reading and saving.

    Memory: with overlap two layers of all models, else one; in float32.
    """
    uploader = Uploader(job.device)
    results = {index: LayerResult(job.layers[index].name) for index in indices}

    def read(index: int) -> LayerInput | StoredDeltas:
        begun = time.monotonic()
        found: LayerInput | StoredDeltas
        if job.settings.optimises:
            found = read_layer(job, index, uploader=uploader)
        else:
            found = read_deltas(job, list(job.layers[index].parameters.values()))
        results[index].seconds["read"] = time.monotonic() - begun
        return found

    def compute(index: int, inputs: LayerInput | StoredDeltas) -> Mapping[str, Tensor]:
        name, result = job.layers[index].name, results[index]
        tensors: Mapping[str, Tensor]
        if isinstance(inputs, StoredDeltas):
            display.begin("start", name, index, 1, list(job.experts))
            begun = time.monotonic()
            tensors = merged_tensors(job, inputs)
            result.seconds["start"] = time.monotonic() - begun
            display.end()
        else:
            for layer in (inputs.pretrained, *inputs.finetuned.values()):
                uploader.take_over(layer)
            try:
                tensors = _optimise(job, work, inputs, display, mode, source, result)
            except RuntimeError as error:
                error.add_note(f"(layer {name})")
                raise
        memory.trim()  # the next layer may be of other shapes
        display.layer_done()
        return tensors

    def save(index: int, tensors: Mapping[str, Tensor]) -> None:
        begun = time.monotonic()
        result = results[index]
        work.save_layer(result.layer, tensors, result.as_record())
        result.seconds["save"] = time.monotonic() - begun
        work.save_times(result.layer, result.seconds)

    waited = overlapped(indices, read, compute, save, overlap=overlap)
    return results, waited


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
        found |= construct_layer(inputs, job.settings, groups, paths, display, work.part)
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
    adapted = adapt_layer(inputs, anchors, start, job.settings, display, extra, work.part)
    history = adapted.history.tolist()
    result.adaptation = history[0], history[-1]
    result.snapshots = {epoch: history[epoch - 1] for epoch in job.settings.adapt.snapshots}
    result.epochs = [rounded(loss) for loss in history]
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
