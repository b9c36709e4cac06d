"""The page's plots: each takes results and gives one captioned figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch

from fda_fast.layerwork import LayerResult
from fda_fast.report.curves import alignment_curve, distance_of
from fda_fast.report.plots import ACCENT, INK, MUTED, drawing, legend, steps_axis, svg
from fda_fast.report.representation import Bias
from fda_fast.report.results import LayerAnalysis, TaskAnalysis


def figure(picture: str, caption: str) -> str:
    """A plot with its caption, as HTML."""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _shade(index: int, count: int) -> float:
    """Opacity from faint to full, in the order of layers or steps."""
    return 1.0 if count < 2 else 0.22 + 0.78 * index / (count - 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def construction(task: str, layers: Sequence[LayerResult], number: int) -> str:
    """Alignment loss over the steps of one expert, a line for every layer."""
    curves = []
    for layer in layers:
        if task in layer.tasks:
            steps, losses = alignment_curve(layer.tasks[task])
            if steps:
                curves.append((steps, losses))
    if not curves:
        return ""
    with drawing() as (canvas, axes):
        for index, (steps, losses) in enumerate(curves):
            axes.plot(steps, losses, color=ACCENT, alpha=_shade(index, len(curves)))
        axes.set_xlabel("step")
        axes.set_ylabel("mean of 1 − cosine")
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, None)
        axes.set_title(task, loc="left", fontsize=11.5, color=INK)
        first, last = _mean([c[1][0] for c in curves]), _mean([c[1][-1] for c in curves])
        text = (
            f"Construction of {task}: the alignment loss per tensor falls from {first:.2f} to "
            f"{last:.2f} on average over {len(curves)} layers."
        )
        picture = svg(canvas, f"construction-{number}", text)
    return figure(picture, "Fainter: earlier layers.")


def adaptation(layers: Sequence[LayerResult], distance: str) -> str:
    """Adaptation loss by epoch relative to the first, a line for every layer."""
    curves = []
    for layer in layers:
        values = [distance_of(loss, distance) for loss in layer.epochs]
        if values and values[0] > 0:
            curves.append([value / values[0] for value in values])
    if not curves:
        return ""
    from matplotlib.ticker import MaxNLocator

    with drawing() as (canvas, axes):
        for index, curve in enumerate(curves):
            alpha = _shade(index, len(curves))
            marker = "o" if len(curve) < 20 else None
            axes.plot(
                range(1, len(curve) + 1), curve, color=ACCENT, alpha=alpha, marker=marker, ms=3
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("distance, first epoch = 1")
        axes.set_ylim(0, max(1.04, *map(max, curves)))
        axes.set_title("adaptation", loc="left", fontsize=11.5, color=INK)
        text = (
            f"Adaptation: the distance from the experts, relative to the first epoch, ends between "
            f"{min(c[-1] for c in curves):.2f} and {max(c[-1] for c in curves):.2f}."
        )
        picture = svg(canvas, "adaptation", text)
    return figure(picture, "Fainter: earlier layers. Mean over the anchors of all experts.")


def spectra(layer: LayerAnalysis, number: int) -> str:
    """Normalised singular values, mean over the experts, a line for every step."""
    tasks = list(layer.tasks.values())
    if not tasks:
        return ""
    steps = sorted(set.intersection(*(set(task.spectra) for task in tasks)))
    if not steps:
        return ""
    with drawing() as (canvas, axes):
        for index, step in enumerate(steps):
            values = torch.stack([task.spectra[step].values for task in tasks]).mean(0)
            label = f"step {step}" if step in (steps[0], steps[-1]) else None
            # What the anchors began as is drawn apart: it is what they are compared with.
            begin = step == 0 and len(steps) > 1
            axes.plot(
                range(1, len(values) + 1),
                values.tolist(),
                color=INK if begin else ACCENT,
                ls="--" if begin else "-",
                alpha=1 if begin else _shade(index, len(steps)),
                label=label,
            )
        axes.set_xlabel("singular value, by rank")
        axes.set_ylabel("relative to the largest")
        axes.set_yscale("log")
        axes.set_ylim(max(1e-4, 0.6 * min(axes.dataLim.y0, 0.1)), 1.3)
        axes.set_title(layer.layer, loc="left", fontsize=11.5, pad=20, color=INK)
        legend(axes)
        first, last = (_mean([t.spectra[s].gini for t in tasks]) for s in (steps[0], steps[-1]))
        text = (
            f"Spectrum of the anchors of {layer.layer}: Gini coefficient {first:.2f} at step "
            f"{steps[0]}, {last:.2f} at step {steps[-1]}."
        )
        picture = svg(canvas, f"spectrum-{number}", text)
    change = f"{first:.2f} to {last:.2f}" if len(steps) > 1 else f"{last:.2f}"
    return figure(picture, f"Gini coefficient: {change}. Mean over the experts.")


def overlap_over_steps(layer: LayerAnalysis, number: int) -> str:
    """Subspace similarity with real activations by step, a line for every expert."""
    tasks = {name: task for name, task in layer.tasks.items() if task.overlaps}
    if not tasks:
        return ""
    with drawing() as (canvas, axes):
        ends = []
        for task in tasks.values():
            steps = sorted(task.overlaps)
            values = [task.overlaps[step].similarity[0] for step in steps]
            ends.append((values[0], values[-1]))
            axes.plot(steps, values, color=ACCENT, alpha=0.75, marker="o", ms=3)
        some = next(iter(tasks.values()))
        found = some.overlaps[min(some.overlaps)]
        axes.axhline(found.chance[0], color=INK, ls="--", lw=1, label="chance")
        halves = [t.overlap_of_data.similarity[0] for t in tasks.values() if t.overlap_of_data]
        if halves:
            axes.axhline(_mean(halves), color=MUTED, ls=":", lw=1.3, label="two halves of the data")
        steps_axis(axes)
        axes.set_ylim(0, min(1.0, 1.15 * max([0.3, *halves, *(end[1] for end in ends)])))
        axes.set_ylabel(f"similarity at k = {found.ranks[0]}")
        axes.set_title(layer.layer, loc="left", fontsize=11.5, pad=20, color=INK)
        legend(axes)
        first, last = _mean([e[0] for e in ends]), _mean([e[1] for e in ends])
        text = (
            f"Subspace similarity of {layer.layer} with real activations: {first:.3f} at the "
            f"first step, {last:.3f} at the last, {found.chance[0]:.3f} by chance."
        )
        picture = svg(canvas, f"overlap-{number}", text)
    return figure(picture, f"Mean over the experts: {first:.3f} to {last:.3f}. A line an expert.")


def overlap_over_ranks(layer: LayerAnalysis, number: int) -> str:
    """Subspace similarity by the number of dimensions compared."""
    pairs = [task.overlap_by_rank for task in layer.tasks.values() if task.overlap_by_rank]
    if not pairs:
        return ""
    count = min(len(last.ranks) for _, last in pairs)
    with drawing() as (canvas, axes):
        ranks = pairs[0][1].ranks[:count]
        first, last = (
            [_mean([pair[end].similarity[i] for pair in pairs]) for i in range(count)]
            for end in (0, 1)
        )
        axes.plot(ranks, last, color=ACCENT, label="last step")
        axes.plot(ranks, first, color=INK, ls="--", lw=1.2, label="first step")
        axes.plot(ranks, pairs[0][1].chance[:count], color=MUTED, ls=":", label="chance")
        axes.set_xlabel("dimensions k")
        axes.set_ylabel("similarity")
        axes.set_xlim(0, None)
        axes.set_ylim(0, None)
        axes.set_title(layer.layer, loc="left", fontsize=11.5, pad=20, color=INK)
        legend(axes)
        text = (
            f"Subspace similarity of {layer.layer} by dimension: at k = {ranks[0]} {last[0]:.2f}, "
            f"at k = {ranks[-1]} {last[-1]:.2f}."
        )
        picture = svg(canvas, f"ranks-{number}", text)
    return figure(picture, "Mean over the experts, by the number of leading directions.")


def energy(layer: LayerAnalysis, number: int) -> str:
    """Projection energy by step, both ways."""
    tasks = [task for task in layer.tasks.values() if task.energy]
    if not tasks:
        return ""
    with drawing() as (canvas, axes):
        steps = sorted(set.intersection(*(set(task.energy) for task in tasks)))
        values = [_mean([task.energy[step] for task in tasks]) for step in steps]
        axes.plot(steps, values, color=ACCENT, marker="o", ms=3, label="anchors on data")
        reverse = _reverse(tasks)
        if reverse:
            axes.plot(
                list(reverse),
                list(reverse.values()),
                color=INK,
                ls="--",
                lw=1.2,
                marker="o",
                ms=3,
                label="data on anchors",
            )
        vector = [task.reference for task in tasks if task.reference is not None]
        if vector:
            axes.axhline(_mean(vector), color=MUTED, ls=":", lw=1.3, label="task vector on data")
        steps_axis(axes)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of the norm")
        axes.set_title(layer.layer, loc="left", fontsize=11.5, pad=36, color=INK)
        legend(axes, ncols=2)
        text = (
            f"Projection energy of {layer.layer}: the anchors' update on the cone of real updates "
            f"goes from {values[0]:.2f} to {values[-1]:.2f}."
        )
        picture = svg(canvas, f"energy-{number}", text)
    return figure(
        picture, f"Anchors' update: {values[0]:.2f} to {values[-1]:.2f}. Mean over experts."
    )


def _reverse(tasks: Sequence[TaskAnalysis]) -> dict[int, float]:
    steps = sorted(set.intersection(*(set(task.reverse) for task in tasks)))
    return {step: _mean([task.reverse[step] for task in tasks]) for step in steps}


def bias(task: str, models: Mapping[str, Sequence[Bias]], number: int) -> str:
    """Distance from one expert's features by layer, a line for every model."""
    style: dict[str, dict[str, Any]] = {
        "merged": {"color": ACCENT, "lw": 2, "label": "merged"},
        "start": {"color": INK, "ls": "--", "label": "its start"},
        "pretrained": {"color": MUTED, "ls": ":", "label": "pretrained"},
    }
    from matplotlib.ticker import MaxNLocator

    with drawing() as (canvas, axes):
        for name in ("pretrained", "start", "merged"):
            if name in models:
                values = [found.relative for found in models[name]]
                axes.plot(range(1, len(values) + 1), values, marker="o", ms=3, **style[name])
        axes.set_xlabel("layer, from the input on")
        axes.set_ylabel("relative distance")
        axes.set_ylim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(task, loc="left", fontsize=11.5, pad=20, color=INK)
        legend(axes)
        ends = {name: values[-1].relative for name, values in models.items()}
        said = ", ".join(f"{name} {value:.3f}" for name, value in ends.items())
        picture = svg(
            canvas, f"bias-{number}", f"Distance from the features of {task} at the end: {said}."
        )
    return figure(picture, "At the last layer: " + said + ".")
