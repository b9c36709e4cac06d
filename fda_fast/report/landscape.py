"""A loss on the plane through three settings of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fda_fast.errors import InputError
from fda_fast.layers.call import call_layer
from fda_fast.ops import similarity

Weights = Mapping[str, Tensor]
"""Parameters by name."""


@dataclass(frozen=True)
class Plane:
    """The plane through an origin and two other settings of the same weights.

    Coordinates are distances in weight space: x along (first - origin), y at a right angle to it,
    towards ``second``.

    Attributes:
        origin: the weights at (0, 0).
        first: first - origin; it lies at (|first|, 0).
        second: second - origin.
    """

    origin: dict[str, Tensor] = field(repr=False)
    first: dict[str, Tensor] = field(repr=False)
    second: dict[str, Tensor] = field(repr=False)

    @classmethod
    def through(cls, origin: Weights, first: Weights, second: Weights) -> Plane:
        """The plane through three settings.

        Raises:
            InputError: different tensors, or three settings on one line.
        """
        plane = cls(
            {name: tensor.detach() for name, tensor in origin.items()},
            _difference(first, origin),
            _difference(second, origin),
        )
        aa, ab, bb = plane._gram()
        if aa <= 0 or bb - ab * ab / aa <= 1e-12 * bb:
            raise InputError("a plane", expected="three settings that are not on one line")
        return plane

    def _gram(self) -> tuple[float, float, float]:
        return (
            _inner(self.first, self.first),
            _inner(self.first, self.second),
            _inner(self.second, self.second),
        )

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The weights at (x, y)."""
        aa, ab, bb = self._gram()
        b = y / math.sqrt(bb - ab * ab / aa)
        a = x / math.sqrt(aa) - b * ab / aa
        return {
            name: tensor + a * self.first[name] + b * self.second[name]
            for name, tensor in self.origin.items()
        }

    def coordinates(self, weights: Weights) -> tuple[float, float, float]:
        """(x, y) of the nearest point of the plane, and the distance from it."""
        delta = _difference(weights, self.origin)
        aa, ab, bb = self._gram()
        along, towards = _inner(delta, self.first), _inner(delta, self.second)
        x = along / math.sqrt(aa)
        y = (towards - along * ab / aa) / math.sqrt(bb - ab * ab / aa)
        return x, y, math.sqrt(max(0.0, _inner(delta, delta) - x * x - y * y))


@dataclass(frozen=True)
class Place:
    """One setting of the weights on, or beside, the plane.

    Attributes:
        x, y: coordinates of the nearest point of the plane.
        off: distance from the plane; above 0 the loss is not that of the plane at (x, y).
        loss: of the setting itself.
    """

    x: float
    y: float
    off: float
    loss: float


@dataclass(frozen=True)
class Landscape:
    """A loss on a grid of a plane.

    Attributes:
        x: [n] coordinates.
        y: [n].
        loss: [n, n], loss[i, j] at (x[j], y[i]); float64.
        places: named settings.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    places: dict[str, Place]


def landscape(
    plane: Plane,
    loss: Callable[[dict[str, Tensor]], float],
    places: Mapping[str, Weights],
    *,
    resolution: int = 13,
    margin: float = 0.25,
) -> Landscape:
    """Evaluate a loss on a grid that holds all places.

    Args:
        plane: from ``Plane.through``.
        loss: called with parameters by name.
        places: settings to mark.
        resolution: points of the grid in each direction, 2 or more.
        margin: how far the grid goes beyond the places, as a share of their extent.

    Cost: resolution^2 + len(places) evaluations of ``loss``.
    Source: the construction of the plane is Garipov et al., 2018; the paper (section 2.5) does not
    say how its plane was made.
    """
    if resolution < 2:
        raise InputError("resolution", expected="at least 2", got=resolution)
    marked = {}
    for name, weights in places.items():
        x, y, off = plane.coordinates(weights)
        marked[name] = Place(x, y, off, loss(dict(weights)))
    aa, ab, bb = plane._gram()
    xs = [0.0, math.sqrt(aa), ab / math.sqrt(aa), *(place.x for place in marked.values())]
    ys = [0.0, math.sqrt(bb - ab * ab / aa), *(place.y for place in marked.values())]
    # A square map: both axes have one scale, so that distances are not distorted.
    half = (0.5 + margin) * max(max(xs) - min(xs), max(ys) - min(ys))
    x_grid, y_grid = (
        torch.linspace(-half, half, resolution).double() + (max(values) + min(values)) / 2
        for values in (xs, ys)
    )
    values = [[loss(plane.at(x, y)) for x in x_grid.tolist()] for y in y_grid.tolist()]
    return Landscape(x_grid, y_grid, torch.tensor(values, dtype=torch.float64), marked)


def adaptation_loss(
    layer: nn.Module, tasks: Sequence[tuple[Tensor, nn.Module]], distance: str = "cosine"
) -> Callable[[dict[str, Tensor]], float]:
    """The loss that adaptation lowers, as a function of one layer's parameters.

    Args:
        layer: any version of the layer; its structure and buffers are used.
        tasks: (inputs [n, (T,) d], expert's layer): anchors, or real activations.
        distance: "cosine", "l2" or "l1", as ``adapt`` defines them.

    Returns:
        {parameter name: tensor} -> mean over the inputs of all tasks of the distance from the
        expert's output. Unlike ``adapt``'s, the cosine one is 1 - cos, so that 0 is its minimum.
    """
    similarity.check_kind(distance)
    with torch.no_grad():
        targets = [call_layer(expert, inputs) for inputs, expert in tasks]

    @torch.no_grad()
    def loss(parameters: dict[str, Tensor]) -> float:
        total = 0.0
        for (inputs, _), target in zip(tasks, targets, strict=True):
            found = call_layer(layer, inputs, parameters)
            total += _distance(found, target, distance).sum().item()
        return total / sum(len(inputs) for inputs, _ in tasks)

    return loss


def _distance(found: Tensor, target: Tensor, distance: str) -> Tensor:
    """Of every input, [n]."""
    found, target = found.flatten(1), target.flatten(1)
    if distance == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(found, target, dim=1)
    if distance == "l2":
        return (found - target).square().sum(1)
    return (found - target).abs().sum(1)


def _difference(weights: Weights, origin: Weights) -> dict[str, Tensor]:
    found = {}
    for name, tensor in origin.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise InputError(f"weights: tensor {name}", expected=list(tensor.shape))
        found[name] = weights[name].detach() - tensor.detach()
    return found


def _inner(first: Weights, second: Weights) -> float:
    return sum(
        first[name].flatten().double().dot(second[name].flatten().double()).item() for name in first
    )
