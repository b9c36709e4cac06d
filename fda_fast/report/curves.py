"""What a run's record says about its optimisations: cosines, losses, and how far they came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fda_fast.layerwork import LayerResult, TaskResult


def live_cosines(result: TaskResult) -> dict[str, float]:
    """Cosines of the tensors that have a direction.

    A tensor that the expert did not change, or whose gradient is identically zero (the key bias of
    softmax attention), is the constant 1 in the loss and has the cosine 0 in the record.
    """
    return {name: cosine for name, cosine in result.cosines.items() if cosine != 0.0}


def mean_cosine(result: TaskResult) -> float | None:
    """Mean cosine of the tensors that have a direction; None if there are none."""
    live = list(live_cosines(result).values())
    return sum(live) / len(live) if live else None


def alignment_curve(result: TaskResult) -> tuple[list[int], list[float]]:
    """Steps, and the mean of 1 - cos over the tensors that have a direction."""
    live = len(live_cosines(result))
    if result.history is None or not live:
        return [], []
    constant = len(result.cosines) - live
    return list(result.history.steps), [(x - constant) / live for x in result.history.losses]


def distance_of(loss: float, distance: str) -> float:
    """An adaptation loss as a distance from the experts, 0 at best: cosine's best loss is -1."""
    return loss + 1 if distance == "cosine" else loss


def remaining(layer: LayerResult, distance: str) -> float | None:
    """The last epoch's distance from the experts as a share of the first's."""
    if layer.adaptation is None:
        return None
    first, last = (distance_of(loss, distance) for loss in layer.adaptation)
    return last / first if first > 0 else None


@dataclass(frozen=True)
class Headline:
    """A merge in a few numbers.

    Attributes:
        cosine: mean over layers and experts; None without anchors.
        worst: (layer, mean cosine over the experts) of the layer with the lowest one.
        worst_task: the same of the experts.
        remaining: mean over layers of what adaptation left of the distance; None without it.
        spread: its least and greatest value.
    """

    cosine: float | None
    worst: tuple[str, float] | None
    worst_task: tuple[str, float] | None
    remaining: float | None
    spread: tuple[float, float] | None


def headline(layers: list[LayerResult], distance: str) -> Headline:
    """The headline of a run's layers; ``distance`` is adaptation's."""
    table = {
        layer.layer: {task: mean_cosine(result) for task, result in layer.tasks.items()}
        for layer in layers
    }
    by_layer = {name: _mean(row) for name, row in table.items()}
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    by_task = {task: _mean({n: row.get(task) for n, row in table.items()}) for task in tasks}
    left = [share for layer in layers if (share := remaining(layer, distance)) is not None]
    return Headline(
        _mean({f"{n}/{t}": v for n, row in table.items() for t, v in row.items()}),
        _lowest(by_layer),
        _lowest(by_task) if len(tasks) > 1 else None,
        sum(left) / len(left) if left else None,
        (min(left), max(left)) if left else None,
    )


def _mean(values: Mapping[str, float | None]) -> float | None:
    there = [value for value in values.values() if value is not None]
    return sum(there) / len(there) if there else None


def _lowest(values: Mapping[str, float | None]) -> tuple[str, float] | None:
    there = {name: value for name, value in values.items() if value is not None}
    if not there:
        return None
    name = min(there, key=there.__getitem__)
    return name, there[name]
