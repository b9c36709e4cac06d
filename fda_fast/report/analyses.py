"""The analyses of the paper's section 3 on one merge: what its inputs allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fda_fast.anchors import Anchors
from fda_fast.errors import InputError
from fda_fast.report.landscape import Landscape, Plane, adaptation_loss, landscape
from fda_fast.report.projection import cone_projection, induced_updates
from fda_fast.report.replay import milestones, replay
from fda_fast.report.representation import Bias, hidden_states, representation_bias
from fda_fast.report.run import Run
from fda_fast.report.spectrum import Spectrum, spectrum
from fda_fast.report.subspace import SHARE, Overlap, directions, overlap
from fda_fast.work import file_name

if TYPE_CHECKING:
    from fda_fast.job import Job
    from fda_fast.layerwork import LayerInput

BATCHES = 32
"""Update vectors that span a cone, at most; the paper takes 512 of whole training."""
ARITHMETIC = 0.3
"""Task Arithmetic's published factor, for the point of that name."""


@dataclass
class TaskAnalysis:
    """What is known of one (layer, task).

    Attributes:
        spectra: spectrum of the anchors by step.
        drift: largest difference of the repeated construction's last anchors from the kept ones,
            relative to the kept ones' largest value; None if none were kept.
        overlaps: with the real activations, by step, at a fifth of the width.
        overlap_by_rank: of the last step's anchors, and of the first step's, at many ranks.
        overlap_of_data: of one half of the real activations with the other: what could be reached.
        energy: share of the anchors' update in the cone of real updates, by step.
        reverse: share of the real update in the cone of the anchors' updates, at the first and the
            last step.
        reference: share of the task vector in the cone of real updates.
    """

    spectra: dict[int, Spectrum] = field(default_factory=dict)
    drift: float | None = None
    overlaps: dict[int, Overlap] = field(default_factory=dict)
    overlap_by_rank: tuple[Overlap, Overlap] | None = None
    overlap_of_data: Overlap | None = None
    energy: dict[int, float] = field(default_factory=dict)
    reverse: dict[int, float] = field(default_factory=dict)
    reference: float | None = None


@dataclass
class LayerAnalysis:
    """What is known of one layer.

    Attributes:
        layer: its name.
        tasks: by task name; experts that leave the layer as it is are missing.
        on_anchors: the adaptation loss around the pretrained and the merged layer.
        on_activations: the same loss on real activations.
    """

    layer: str
    tasks: dict[str, TaskAnalysis] = field(default_factory=dict)
    on_anchors: Landscape | None = None
    on_activations: Landscape | None = None


@dataclass
class Analyses:
    """All analyses of a run.

    Attributes:
        layers: of the layers looked at.
        bias: {model: {task: [bias of every layer]}}, distance from the expert's features.
        bias_layers: names of these layers.
        missing: what could not be done, and how to get it.
    """

    layers: list[LayerAnalysis] = field(default_factory=list)
    bias: dict[str, dict[str, list[Bias]]] = field(default_factory=dict)
    bias_layers: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def choose_layers(run: Run, wanted: str | None) -> list[int]:
    """Indices of the layers to look at closely.

    Args:
        run: the merge.
        wanted: None for the middle and the last one, "all", "none", or names or numbers with commas
            between; negative numbers count from the end.

    Raises:
        InputError: a layer that there is not.
    """
    count, names = len(run.layers), [layer.layer for layer in run.layers]
    if wanted in ("all", "none"):
        return list(range(count)) if wanted == "all" else []
    if wanted is None:
        return sorted({count // 2 - (count > 1), count - 1})
    found = []
    for word in wanted.split(","):
        word = word.strip()
        if word in names:
            found.append(names.index(word))
        elif word.removeprefix("-").isdigit() and -count <= int(word) < count:
            found.append(int(word) % count)
        else:
            known = f"0 to {count - 1}, all, none, or {names[0]}, ..."
            raise InputError(f"layer {word!r}", expected=known)
    return sorted(set(found))


def without_checkpoints(run: Run) -> Analyses:
    """Spectra of the anchors that the run kept; everything else needs the checkpoints."""
    result = Analyses()
    if run.anchors is None:
        result.missing.append(
            "Spectrum of the anchors: merge with --keep-anchors, or give --pretrained and --expert."
        )
    else:
        for index in choose_layers(run, None):
            layer = LayerAnalysis(run.layers[index].layer)
            for task in run.layers[index].tasks:
                saved = run.saved_anchors(task, layer.layer)
                if saved is not None:
                    step = int(saved.settings.get("steps_done") or saved.settings.get("steps", 0))
                    layer.tasks[task] = TaskAnalysis({step: spectrum(saved.tensor)})
            result.layers.append(layer)
        result.missing.append(
            "The spectrum over the run: give --pretrained DIR and --expert NAME=DIR for each."
        )
    result.missing.append(
        "Subspace similarity, projection energy, loss landscape, representation bias: give "
        "--pretrained, --expert for each expert, and --texts or --activations."
    )
    return result


def read_activations(folder: Path, run: Run) -> dict[str, dict[str, Tensor]]:
    """Real activations {task: {layer: [n, (T,) d]}} from files <expert>/<layer>.safetensors.

    Raises:
        InputError: nothing there for this run.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for task in run.tasks:
        for layer in run.layers:
            path = folder / file_name(task) / f"{file_name(layer.layer)}.safetensors"
            if path.is_file():
                found.setdefault(task, {})[layer.layer] = Anchors.load(path).tensor
    if not found:
        raise InputError(
            f"activations {folder}: nothing for this run",
            expected="files <expert>/<layer>.safetensors, as save_activations writes them",
        )
    return found


def analyse(
    run: Run,
    job: Job,
    *,
    indices: Sequence[int],
    texts: Mapping[str, Path] | None = None,
    activations: Path | None = None,
) -> Analyses:
    """All analyses that the inputs allow.

    Args:
        run: the merge.
        job: its checkpoints, from ``run.job``.
        indices: layers whose construction is repeated and looked at closely.
        texts: files of texts by task, one a line.
        activations: a folder that ``save_activations`` wrote; used in place of texts where given.

    Cost: construction of these layers once more, and forward passes over at most 64 texts a task.
    """
    from fda_fast.pipeline import read_layer

    result = Analyses()
    real: dict[str, dict[str, Tensor]] = {}
    if activations is not None:
        real = read_activations(activations, run)
    if texts:
        collected = _read_texts(run, job, texts, result, collect=activations is None)
        real = real or collected
    else:
        result.missing.append("Representation bias: give --texts, a file of one text a line.")
    if not real:
        result.missing.append(
            "Subspace similarity, projection energy: give --texts or --activations."
        )
    for index in indices:
        inputs = read_layer(job, index)
        name = inputs.name
        here = {task: layers[name] for task, layers in real.items() if name in layers}
        result.layers.append(_layer(run, job, inputs, here, result))
    if not indices:
        result.missing.append(
            "Spectrum, subspace similarity, projection energy, loss landscape: --layers is none."
        )
    return result


def _layer(
    run: Run, job: Job, inputs: LayerInput, real: Mapping[str, Tensor], result: Analyses
) -> LayerAnalysis:
    from fda_fast.job import groups_of, tasks_per_batch
    from fda_fast.layerwork import check_origin

    found = LayerAnalysis(inputs.name)
    done = next(layer for layer in run.layers if layer.layer == inputs.name)
    last: dict[str, Tensor] = {}
    steps = {}
    for task in inputs.finetuned:
        saved = run.saved_anchors(task, inputs.name)
        if saved is not None:
            check_origin(saved, inputs, task, run.folder)
            last[task] = saved.tensor
        if task not in inputs.unchanged and task in done.tasks:
            steps[task] = milestones(done.tasks[task].steps or job.settings.construct.steps)
    kept: dict[str, dict[int, Tensor]] = {}
    for group in groups_of(list(steps), tasks_per_batch(job)):
        kept |= replay(inputs, job.settings, group, steps)
    for task, by_step in kept.items():
        final = by_step[max(by_step)]
        analysis = found.tasks[task] = TaskAnalysis()
        if task in last:
            scale = last[task].abs().max().item()
            analysis.drift = (final - last[task]).abs().max().item() / scale
        last.setdefault(task, final)
        analysis.spectra = {step: spectrum(tensor) for step, tensor in by_step.items()}
        if task in real:
            _compare(analysis, inputs, task, by_step, real[task], job, result)
    _landscapes(run, job, inputs, last, real, found)
    return found


def _compare(
    analysis: TaskAnalysis,
    inputs: LayerInput,
    task: str,
    by_step: Mapping[int, Tensor],
    real: Tensor,
    job: Job,
    result: Analyses,
) -> None:
    """Anchors against real activations: subspaces, then updates."""
    there = {step: directions(tensor) for step, tensor in by_step.items()}
    true = directions(real)
    width = true.shape[-1]
    spanned = min(len(true), *(len(rows) for rows in there.values()))
    rank = min(max(1, round(SHARE * width)), spanned)
    analysis.overlaps = {step: overlap(rows, true, [rank]) for step, rows in there.items()}
    ranks = sorted({max(1, round(spanned * i / 24)) for i in range(1, 25)})
    first, last = min(there), max(there)
    analysis.overlap_by_rank = overlap(there[first], true, ranks), overlap(there[last], true, ranks)
    if len(real) > 1:
        halves = directions(real[::2]), directions(real[1::2])
        if rank <= min(map(len, halves)):
            analysis.overlap_of_data = overlap(*halves, [rank])
    base, expert = inputs.pretrained, inputs.finetuned[task]
    count = _batches(inputs, job, min(len(real), len(by_step[first])))
    if count < 2:
        note = "Projection energy: not enough memory for the updates of a layer, or of inputs."
        if note not in result.missing:
            result.missing.append(note)
        return
    device = next(base.parameters()).device
    distance = job.settings.construct.distance
    data = induced_updates(base, expert, real.to(device), count=count, distance=distance)
    whole = {name: sum_of([update[name] for update in data]) for name in data[0]}
    vector = {
        name: theirs.detach() - dict(base.named_parameters())[name].detach()
        for name, theirs in expert.named_parameters()
    }
    analysis.reference = cone_projection(vector, data).ratio
    for step, tensor in by_step.items():
        # The gradient over all anchors is one update; only the reverse needs them one by one.
        parts = count if step in (first, last) else 1
        made = induced_updates(base, expert, tensor.to(device), count=parts, distance=distance)
        update = {name: sum_of([part[name] for part in made]) for name in made[0]}
        analysis.energy[step] = cone_projection(update, data).ratio
        if parts > 1:
            analysis.reverse[step] = cone_projection(whole, made).ratio


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)


def _batches(inputs: LayerInput, job: Job, most: int) -> int:
    """How many updates of a layer fit a quarter of the free memory, two sets and a copy of one."""
    from fda_fast.job import free_memory

    numel = sum(parameter.numel() for parameter in inputs.pretrained.parameters())
    return min(BATCHES, most, free_memory(job.device) // 4 // (3 * 4 * numel))


def _landscapes(
    run: Run,
    job: Job,
    inputs: LayerInput,
    anchors: Mapping[str, Tensor],
    real: Mapping[str, Tensor],
    found: LayerAnalysis,
) -> None:
    """The adaptation loss on the plane of pretrained, experts' mean and merged layer."""
    from fda_fast.checkpoints.reader import Checkpoint
    from fda_fast.startpoint import merged_tensor

    spec = job.layers[inputs.index]
    device = job.device
    merged_model = Checkpoint.open(run.folder, role="merged model")
    stored = merged_model.read(list(spec.parameters.values()))
    merged = {local: stored[name].float().to(device) for local, name in spec.parameters.items()}
    merged_model.close()
    base = {name: p.detach() for name, p in inputs.pretrained.named_parameters()}
    experts = {
        task: {name: p.detach() for name, p in layer.named_parameters()}
        for task, layer in inputs.finetuned.items()
    }
    mean = {name: sum_of([e[name] for e in experts.values()]) / len(experts) for name in base}
    arithmetic = {
        name: base[name] + ARITHMETIC * len(experts) * (mean[name] - base[name]) for name in base
    }
    places = {"pretrained": base, "merged": merged}
    if job.settings.start != "pretrained":
        start = {n: merged_tensor(job, full).to(device) for n, full in spec.parameters.items()}
        places["start"] = start
    if job.settings.start != "task_arithmetic":
        places["Task Arithmetic"] = arithmetic
    places |= experts
    try:
        plane = Plane.through(base, mean, merged)
    except InputError:
        return  # the merged layer lies on the way to the mean: there is no plane to show
    distance = job.settings.adapt.distance
    # As many vectors of each kind: the map takes hundreds of forward passes.
    rows = {task: tensor.numel() // tensor.shape[-1] for task, tensor in anchors.items()}
    fewer = {
        task: tensor[: max(8, rows.get(task, 0) * tensor.shape[-1] // tensor[0].numel())]
        for task, tensor in real.items()
    }
    for values, kind in ((anchors, "on_anchors"), (fewer, "on_activations")):
        tasks = [
            (tensor.to(device), inputs.finetuned[task])
            for task, tensor in values.items()
            if task in inputs.finetuned
        ]
        if tasks:
            loss = adaptation_loss(inputs.pretrained, tasks, distance)
            setattr(found, kind, landscape(plane, loss, places))


def _read_texts(
    run: Run, job: Job, texts: Mapping[str, Path], result: Analyses, *, collect: bool
) -> dict[str, dict[str, Tensor]]:
    """The experts' activations on texts; fills in the representation bias."""
    from fda_fast.activations import collect_activations
    from fda_fast.report import texts as reading
    from fda_fast.startpoint import merged_tensor

    if job.base.directory is None:
        raise InputError("texts", expected="a base model in a Hugging Face folder")
    tokenizer = reading.load_tokenizer(run.folder, job.base.directory)
    inputs = {
        task: reading.batches(reading.read_texts(path), tokenizer) for task, path in texts.items()
    }
    model = reading.load_model(job.base.directory)
    names = [layer.layer for layer in run.layers]
    modules = dict(model.named_modules())
    paths = {n: n for n in names if n in modules}
    result.bias_layers = list(paths)
    models = {"pretrained": {}, "merged": _tensors(run, job)}
    layered = [name for spec in job.layers for name in spec.parameters.values()]
    if job.settings.start != "pretrained":
        models["start"] = {name: merged_tensor(job, name) for name in layered}
    features = {}
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for label, tensors in models.items():
        _reset(model, base)
        reading.put(model, job, tensors)
        features[label] = {
            task: hidden_states(model, found, paths) for task, found in inputs.items()
        }
    real = {}
    for task, found in inputs.items():
        _reset(model, base)
        reading.put_expert(model, job, task)
        theirs = hidden_states(model, found, paths)
        if collect:
            real[task] = collect_activations(
                model, found, layers=names, scope=job.settings.scope, count=1 << 30
            )
        for label, by_task in features.items():
            rows = [representation_bias(by_task[task][name], theirs[name]) for name in paths]
            result.bias.setdefault(label, {})[task] = rows
    return real


def _tensors(run: Run, job: Job) -> dict[str, Tensor]:
    """Every tensor of the merged model under the base's names."""
    from fda_fast.checkpoints.reader import Checkpoint

    merged = Checkpoint.open(run.folder, role="merged model")
    try:
        return merged.read([name for name in job.base.names if name in merged.names])
    finally:
        merged.close()


@torch.no_grad()
def _reset(model: torch.nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
