"""The page: everything a merge's record says and its analyses found, in one HTML file."""

from __future__ import annotations

import importlib.resources
from html import escape
from typing import Any

from fda_fast.report import panels
from fda_fast.report.curves import distance_of, headline, live_cosines, mean_cosine, remaining
from fda_fast.report.html import folded, grid, heat_map, mean, section, table, tiles
from fda_fast.report.maps import surface
from fda_fast.report.results import Analyses, LayerAnalysis
from fda_fast.report.run import Run
from fda_fast.times import TIMES, Times
from fda_fast.version import __version__

METHODS = {
    "pretrained": "the pretrained model",
    "task_arithmetic": "Task Arithmetic",
    "tsv": "TSV-M",
    "wudi": "WUDI",
}


def page(run: Run, analyses: Analyses) -> str:
    """The report as one HTML document, without scripts or anything to load.

    Args:
        run: the merge.
        analyses: what was found; what it lacks is left out of the page, and said there.
    """
    style = importlib.resources.files("fda_fast.report").joinpath("style.css").read_text("utf-8")
    title = f"{run.folder.name}: FDA merge report"
    parts = [
        _head(run),
        _alignment(run),
        _optimisation(run),
        *_analyses(analyses),
        _times(run.times),
        _making(run),
        _missing(run, analyses),
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="fda_fast {__version__}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>Made by <code>fda-fast report</code>, version {__version__}. The method is Functional Dual
Anchors, arXiv 2510.21223. The page holds everything it shows; nothing is loaded.</footer>
</main>
</body>
</html>
"""


def _method(run: Run) -> str:
    if run.settings.get("method") != "fda":
        return METHODS.get(str(run.settings.get("method")), str(run.settings.get("method")))
    return f"Functional Dual Anchors from {METHODS[run.settings['start']]}"


def _distance(run: Run) -> str:
    return str(run.settings.get("adapt", {}).get("distance", "cosine"))


def summary(run: Run) -> str:
    """How the merge went, in words; plain text."""
    found = headline(run.layers, _distance(run))
    count = len(run.experts)
    experts = f"{count} expert{'s' if count != 1 else ''}"
    text = f"{experts} of {run.base} merged by {_method(run)}, {len(run.layers)} layers."
    if found.cosine is not None and found.worst is not None:
        text += (
            f" The gradients of the anchors point along the task vectors with a mean cosine of "
            f"{found.cosine:.2f}; the hardest layer is {found.worst[0]} with {found.worst[1]:.2f}"
        )
        text += f", the hardest expert {found.worst_task[0]}." if found.worst_task else "."
    if found.remaining is not None and found.spread is not None:
        low, high = found.spread
        drop = 1 - found.remaining
        if drop >= 0:
            text += (
                f" Adaptation took {drop:.0%} off the merged layers' distance from the experts"
                f" ({1 - high:.0%} to {1 - low:.0%} by layer)."
            )
        else:
            text += f" Adaptation did not help: the distance from the experts grew by {-drop:.0%}."
    return text


def _head(run: Run) -> str:
    found = headline(run.layers, _distance(run))
    cells = []
    if found.cosine is not None:
        cells.append(("mean cosine", f"{found.cosine:.3f}", "of gradient and task vector"))
    if found.worst is not None:
        cells.append(("lowest layer", f"{found.worst[1]:.3f}", found.worst[0]))
    if found.worst_task is not None:
        cells.append(("lowest expert", f"{found.worst_task[1]:.3f}", found.worst_task[0]))
    if found.remaining is not None:
        change = f"{found.remaining - 1:+.0%}".replace("-", "−")
        cells.append(("adaptation", change, "distance from the experts"))
    if not cells:
        cells.append(("experts", str(len(run.experts)), f"{len(run.layers)} layers"))
    return (
        f'<header>\n<p class="eyebrow">Merge report</p>\n<h1>{escape(run.folder.name)}</h1>\n'
        f'<p class="lead">{escape(summary(run))}</p>\n{tiles(cells)}\n</header>'
    )


def _alignment(run: Run) -> str:
    tasks = run.tasks
    if not tasks:
        return ""
    rows = {
        layer.layer: [
            mean_cosine(layer.tasks[task]) if task in layer.tasks else None for task in tasks
        ]
        for layer in run.layers
    }
    names = list(
        dict.fromkeys(n for layer in run.layers for r in layer.tasks.values() for n in r.cosines)
    )
    tensors = {
        layer.layer: [
            mean([live_cosines(result).get(name) for result in layer.tasks.values()])
            for name in names
        ]
        for layer in run.layers
    }
    kept = [i for i in range(len(names)) if any(row[i] is not None for row in tensors.values())]
    by_tensor = {name: [row[i] for i in kept] for name, row in tensors.items()}
    return section(
        "Alignment",
        "The cosine between the gradient that the anchors induce on the pretrained layer and the "
        "expert's task vector: 1 is perfect. Means run over the parameter tensors that the "
        "fine-tuning changed and that have a gradient.",
        heat_map("Mean cosine by layer and expert", tasks, rows),
        folded(
            "By parameter tensor",
            heat_map(
                "Cosine by layer and parameter tensor, mean over the experts",
                [names[i] for i in kept],
                by_tensor,
            ),
        ),
    )


def _optimisation(run: Run) -> str:
    curves = [panels.construction(t, run.layers, i) for i, t in enumerate(run.tasks)]
    distance = _distance(run)
    rows = []
    for layer in run.layers:
        share = remaining(layer, distance)
        if layer.adaptation is None or share is None:
            continue
        first, last = (distance_of(loss, distance) for loss in layer.adaptation)
        change = f"{share - 1:+.0%}".replace("-", "−")
        losses = [result.loss for result in layer.tasks.values()]
        rows.append([layer.layer, f"{mean(losses):.3f}", f"{first:.4g}", f"{last:.4g}", change])
    head = ["layer", "alignment loss", "first epoch", "last epoch", "change"]
    caption = (
        "Alignment loss (sum over the tensors, mean over the experts), and adaptation's "
        f"{distance} distance from the experts per anchor"
    )
    return section(
        "Optimisation",
        "Left to right: construction of each expert's anchors, then adaptation of the merged "
        "layers to all of them.",
        grid(*curves, panels.adaptation(run.layers, distance)),
        folded("Losses by layer", table(caption, head, rows) if rows else ""),
    )


def _analyses(found: Analyses) -> list[str]:
    layers = found.layers
    numbered = list(enumerate(layers))
    return [
        section(
            "Spectrum of the anchors",
            "Singular values of the anchors, unfolded to vectors, relative to the largest. The "
            "paper: whatever they begin as, the spectrum becomes long-tailed. The Gini coefficient "
            "says so in a number: 0 for a flat spectrum, towards 1 for few strong directions."
            + _repeated(layers),
            grid(*(panels.spectra(layer, i) for i, layer in numbered)),
            folded("By expert", _spectrum_table(layers)),
        ),
        section(
            "Subspace similarity",
            "How much the leading directions of the anchors overlap with those of what the "
            "expert's layer takes in on real data: tr(P Q) / k for the projections onto k "
            "directions. The paper: it rises over the run.",
            grid(
                *(
                    draw(layer, i)
                    for i, layer in numbered
                    for draw in (panels.overlap_over_steps, panels.overlap_over_ranks)
                )
            ),
            folded("By expert", _overlap_table(layers)),
        ),
        section(
            "Projection energy",
            "Share of an update that is a non-negative combination of others: of the anchors' "
            "update among the updates that batches of real activations ask for, and the other way "
            "round. 1: the anchors ask for nothing that real data would not.",
            grid(*(panels.energy(layer, i) for i, layer in numbered)),
        ),
        section(
            "Representation bias",
            "Distance of the merged model's features from each expert's, on that expert's texts, "
            "relative to the expert's. Lower is better.",
            grid(
                *(
                    panels.bias(task, {m: by[task] for m, by in found.bias.items()}, i)
                    for i, task in enumerate(next(iter(found.bias.values()), {}))
                )
            ),
        ),
        section(
            "Loss landscape",
            "The loss that adaptation lowers, on the plane through the pretrained layer, the mean "
            "of the experts and the merged layer, on the anchors and, where there are some, on "
            "real activations. Experts are marked at the nearest point of the plane. Distances are "
            "those of weight space.",
            grid(*(picture for i, layer in numbered for picture in _surfaces(layer, i))),
        ),
    ]


def _surfaces(layer: LayerAnalysis, number: int) -> list[str]:
    pairs = ((layer.on_anchors, "anchors"), (layer.on_activations, "real activations"))
    return [
        surface(found, layer.layer, what, f"surface-{number}-{what.split()[0]}")
        for found, what in pairs
        if found is not None
    ]


def _spectrum_table(layers: list[LayerAnalysis]) -> str:
    rows = []
    for layer in layers:
        for task, analysis in layer.tasks.items():
            for step in sorted({min(analysis.spectra), max(analysis.spectra)}):
                found = analysis.spectra[step]
                numbers = (found.gini, found.effective_rank, found.stable_rank)
                cells = [f"{numbers[0]:.3f}", f"{numbers[1]:.1f}", f"{numbers[2]:.2f}"]
                rows.append([f"{layer.layer}, {task}", str(step), *cells])
    head = ["layer and expert", "step", "Gini", "effective rank", "stable rank"]
    return table("Spectrum of the anchors at both ends", head, rows) if rows else ""


def _repeated(layers: list[LayerAnalysis]) -> str:
    """How near the repeated construction came to the anchors that were kept."""
    tasks = [task for layer in layers for task in layer.tasks.values() if task.drift is not None]
    if not tasks:
        return ""
    worst = max(task.drift or 0.0 for task in tasks)
    text = " For this the construction was repeated; "
    if worst == 0:
        return text + "it ends at the anchors kept, bit for bit."
    causes = list(dict.fromkeys(cause for task in tasks for cause in task.elsewhere))
    why = "; ".join(causes) or "the machine and its threads are the same, the program is not"
    return (
        f"{text}it ends within {worst:.1g} of the anchors kept, relative to their largest value. "
        "Only the machine that made them repeats them bit for bit, on as many threads: rounding is "
        f"another elsewhere, and a long optimisation carries it on ({escape(why)})."
    )


def _overlap_table(layers: list[LayerAnalysis]) -> str:
    rows = []
    for layer in layers:
        for task, analysis in layer.tasks.items():
            if not analysis.overlaps:
                continue
            first, last = (analysis.overlaps[end(analysis.overlaps)] for end in (min, max))
            halves = analysis.overlap_of_data
            rows.append(
                [
                    f"{layer.layer}, {task}",
                    str(first.ranks[0]),
                    f"{first.similarity[0]:.3f}",
                    f"{last.similarity[0]:.3f}",
                    f"{first.chance[0]:.3f}",
                    f"{halves.similarity[0]:.3f}" if halves else "–",
                ]
            )
    head = ["layer and expert", "k", "first step", "last step", "chance", "halves of the data"]
    return table("Subspace similarity with real activations", head, rows) if rows else ""


def _times(times: Times) -> str:
    if not times.machine:
        return ""
    phases = [phase for phase in times.phases if phase != "write"]
    rows = [
        [name, *(_seconds(seconds.get(phase)) for phase in phases), _seconds(sum(seconds.values()))]
        for name, seconds in times.layers.items()
    ]
    total = sum(times.phases.values())
    parts = [
        [phase, _seconds(value), f"{value / total:.0%}" if total else "–"]
        for phase, value in times.phases.items()
    ]
    machine = times.machine
    where = str(machine.get("device", "an unknown machine"))
    if "threads" in machine:
        where += f", {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return section(
        "Times",
        f"Measured by the merge, on {escape(where)}, torch {escape(str(machine.get('torch')))}. "
        "Reading a layer and saving the last one go on beside the computation, so the parts can "
        "add up to more than the merge took. Of a merge that was interrupted, each layer's times "
        "are those of the run that finished it.",
        table("Seconds by phase, over all layers", ["phase", "seconds", "share"], parts),
        folded(
            "By layer",
            table("Seconds by layer and phase", ["layer", *phases, "sum"], rows) if rows else "",
        ),
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def _making(run: Run) -> str:
    rows = [[name, value] for name, value in _flat(run.settings)]
    experts = [[name, reference] for name, reference in run.experts.items()]
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    hashes = []
    for layer in run.layers:
        for task in layer.tasks:
            saved = run.saved_anchors(task, layer.layer)
            if saved is not None and saved.pretrained_sha256:
                pair = (saved.pretrained_sha256[:16], saved.expert_sha256[:16])
                hashes.append([f"{layer.layer}, {task}", *pair])
    return section(
        "How it was made",
        "The same settings, checkpoints and versions give the same bytes.",
        table("Checkpoints", ["name", "model"], [["pretrained", run.base], *experts], text=[1]),
        f"<h3>Notes</h3><ul>{notes}</ul>" if notes else "",
        folded("Settings", table("Settings after presets", ["setting", "value"], rows, text=[1])),
        folded(
            "Hashes of the layers",
            table(
                "SHA-256 of the layers the anchors were made from, first 16 digits",
                ["layer and expert", "pretrained", "expert"],
                hashes,
                text=[1, 2],
            )
            if hashes
            else "",
        ),
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((prefix + name, shown if shown else "none"))
    return found


def _missing(run: Run, analyses: Analyses) -> str:
    lines = list(analyses.missing)
    if not run.times.machine:
        lines.append(f"Times: {TIMES} is not in the folder; merges write it.")
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return section("Not on this page", "What is missing, and how to get it.", f"<ul>{items}</ul>")
