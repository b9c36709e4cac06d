"""The analyses of the paper's section 3 on one merge: what its inputs allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fda_fast.anchors import Anchors
from fda_fast.errors import InputError
from fda_fast.machine import as_recorded, differences, here
from fda_fast.report.features import read_features
from fda_fast.report.landscape import Plane, adaptation_loss, landscape
from fda_fast.report.projection import cone_projection, induced_updates
from fda_fast.report.replay import milestones, replay
from fda_fast.report.results import Analyses, LayerAnalysis, TaskAnalysis
from fda_fast.report.run import Run
from fda_fast.report.spectrum import spectrum
from fda_fast.report.subspace import SHARE, directions, overlap
from fda_fast.work import file_name

if TYPE_CHECKING:
    from fda_fast.job import Job
    from fda_fast.layerwork import LayerInput

BATCHES = 32
"""Update vectors that span a cone, at most; the paper takes 512 of whole training."""
NO_ENERGY = (
    "Projection energy: there is no memory for several updates of a layer, or too few inputs."
)
ARITHMETIC = 0.3
"""Task Arithmetic's published factor, for the point of that name."""


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
    say: Callable[[str], None] = lambda _: None,
) -> Analyses:
    """All analyses that the inputs allow.

    Args:
        run: the merge.
        job: its checkpoints, from ``run.job``.
        indices: layers whose construction is repeated and looked at closely.
        texts: files of texts by task, one a line.
        activations: a folder that ``save_activations`` wrote; used in place of texts where given.
        say: told what is being done, in a few words.

    Cost: construction of these layers once more, and forward passes over at most 64 texts a task.
    """
    from fda_fast.pipeline import read_layer

    result = Analyses()
    real: dict[str, dict[str, Tensor]] = {}
    if activations is not None:
        real = read_activations(activations, run)
    if texts:
        say("features on texts")
        collected = read_features(run, job, texts, result, collect=activations is None)
        real = real or collected
    else:
        result.missing.append("Representation bias: give --texts, a file of one text a line.")
    if not real:
        result.missing.append(
            "Subspace similarity, projection energy: give --texts or --activations."
        )
    for number, index in enumerate(indices, 1):
        say(f"layer {number}/{len(indices)} {run.layers[index].layer}")
        inputs = read_layer(job, index)
        name = inputs.name
        data = {task: layers[name] for task, layers in real.items() if name in layers}
        result.layers.append(_layer(run, job, inputs, data, result))
    if not indices:
        result.missing.append(
            "Spectrum, subspace similarity, projection energy, loss landscape: --layers is none."
        )
    return result


def _layer(
    run: Run, job: Job, inputs: LayerInput, real: Mapping[str, Tensor], result: Analyses
) -> LayerAnalysis:
    from fda_fast.layerwork import check_origin

    found = LayerAnalysis(inputs.name)
    done = next(layer for layer in run.layers if layer.layer == inputs.name)
    kept: dict[str, Anchors] = {}
    steps = {}
    for task in inputs.finetuned:
        saved = run.saved_anchors(task, inputs.name)
        if saved is not None:
            check_origin(saved, inputs, task, run.anchors_path(task, inputs.name))
            kept[task] = saved
        if task not in inputs.unchanged and task in done.tasks:
            steps[task] = milestones(done.tasks[task].steps or job.settings.construct.steps)
    last = {task: saved.tensor for task, saved in kept.items()}
    for task, by_step in _repeated(job, inputs, steps, kept).items():
        final = by_step[max(by_step)]
        analysis = found.tasks[task] = TaskAnalysis()
        if task in kept:
            difference = (final - last[task]).abs().max() / last[task].abs().max()
            analysis.drift = difference.item()
            analysis.elsewhere = _elsewhere(kept[task], job)
        last.setdefault(task, final)
        analysis.spectra = {step: spectrum(tensor) for step, tensor in by_step.items()}
        if task in real:
            compare(analysis, inputs, task, by_step, real[task], job)
            if not analysis.energy and NO_ENERGY not in result.missing:
                result.missing.append(NO_ENERGY)
    _landscapes(run, job, inputs, last, real, found)
    return found


def _repeated(
    job: Job,
    inputs: LayerInput,
    steps: Mapping[str, Sequence[int]],
    kept: Mapping[str, Anchors],
) -> dict[str, dict[int, Tensor]]:
    """The anchors of these tasks by step, made as the kept ones say they were."""
    from fda_fast.budget import choose_limits
    from fda_fast.job import groups_of

    found: dict[str, dict[int, Tensor]] = {}
    unknown = []
    for task in steps:
        made = kept[task].settings if task in kept else {}
        if "machine" not in made:
            unknown.append(task)
        elif task not in found:
            batch = [name for name in made.get("batch", [task]) if name in steps]
            found |= replay(inputs, job.settings, batch, steps, made.get("part"), made["machine"])
    limits = choose_limits(job)
    for batch in groups_of(unknown, limits.batch):
        found |= replay(inputs, job.settings, batch, steps, limits.part)
    return {task: found[task] for task in steps}


def _elsewhere(saved: Anchors, job: Job) -> list[str]:
    """In what the machine that made these anchors differs from this one as it repeated them."""
    record = saved.settings.get("machine")
    if record is None:
        return ["the machine they were made on is not recorded"]
    with as_recorded(record):
        return differences(record, here(job.device))


def compare(
    analysis: TaskAnalysis,
    inputs: LayerInput,
    task: str,
    by_step: Mapping[int, Tensor],
    real: Tensor,
    job: Job,
) -> None:
    """Anchors against real activations: subspaces, then updates.

    Args:
        analysis: of this (layer, task); overlaps and energies are filled in, energies only if there
            is memory for at least two updates of the layer.
        inputs: the layer.
        task: the expert.
        by_step: its anchors by step.
        real: what its layer takes in on real data, [n, (T,) d].
        job: the merge.
    """
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
