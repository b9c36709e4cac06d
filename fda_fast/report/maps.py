"""The plot of a loss landscape: contours in the page's accent, and the models where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fda_fast.report.landscape import Landscape, Place
from fda_fast.report.panels import figure
from fda_fast.report.plots import ACCENT, INK, MUTED, PAPER, drawing, svg

LEVELS = 12
MARKS = {"pretrained": "s", "start": "^", "merged": "o", "Task Arithmetic": "D"}
FONT = 9.5
MAP_POINTS = 225.0
"""Width of the map in points, near enough to keep names apart."""


def surface(found: Landscape, layer: str, what: str, name: str) -> str:
    """A loss landscape, as a captioned figure.

    Args:
        found: the loss on its grid, and the places to mark.
        layer: its name.
        what: what the loss was measured on.
        name: of the figure, unique in the page.
    """
    low, high = found.loss.min().item(), found.loss.max().item()
    with drawing((4.2, 3.9)) as (canvas, axes):
        floor = max(low, high * 1e-4)
        edges = torch.linspace(math.log(floor), math.log(high), LEVELS + 1).exp().tolist()
        edges[0], edges[-1] = floor * 0.999, high * 1.001
        # The lower, the stronger: the accent with an opacity for every level.
        accent = int(ACCENT[1:3], 16) / 255
        opacity = [0.92 * (1 - i / (LEVELS - 1)) ** 1.3 for i in range(LEVELS)]
        shades = [(accent, accent, accent, value) for value in opacity]
        x, y, loss = found.x.tolist(), found.y.tolist(), found.loss.clamp_min(floor).tolist()
        axes.contourf(x, y, loss, edges, colors=shades)
        axes.contour(x, y, loss, edges[1:-1], colors=[MUTED], linewidths=0.35)
        for place_name, place in found.places.items():
            axes.plot(
                place.x,
                place.y,
                MARKS.get(place_name, "P"),
                color=PAPER,
                mec=INK,
                mew=1.2 if place_name in MARKS else 0.8,
                ms=7 if place_name == "merged" else 5,
                zorder=3,
            )
        for number, (place_name, offset) in enumerate(_offsets(found).items()):
            place = found.places[place_name]
            drawn = axes.annotate(
                place_name,
                (place.x, place.y),
                xytext=offset,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=FONT,
                color=INK,
                zorder=4,
            )
            drawn.set_gid(f"label-{number}")  # the page's style draws a rim around these
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_xlabel("towards the experts' mean")
        axes.set_ylabel("across")
        axes.set_title(f"{layer}, {what}", loc="left", fontsize=11.5, color=INK)
        merged, base = (_number(found.places[at].loss) for at in ("merged", "pretrained"))
        text = (
            f"Loss of {layer} on {what}: {base} at the pretrained layer, {merged} at the merged "
            "one, and lower in the direction of the stronger colour."
        )
        picture = svg(canvas, name, text)
    return figure(picture, f"Pretrained {base}, merged {merged}. Stronger colour: lower.")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _offsets(found: Landscape) -> Mapping[str, tuple[float, float]]:
    """Where names go, in points from their marks: the place with the least in its way."""
    scale = MAP_POINTS / (found.x[-1] - found.x[0]).item()

    def middle(place: Place) -> tuple[float, float]:
        return (place.x - found.x[0].item()) * scale, (place.y - found.y[0].item()) * scale

    def inside(centre: float, width: float) -> float:
        return max(0.0, width / 2 - centre) + max(0.0, centre + width / 2 - MAP_POINTS)

    boxes = [(*middle(place), 8.0, 8.0) for place in found.places.values()]
    chosen = {}
    # What matters most chooses first.
    for name in sorted(found.places, key=lambda n: list(MARKS).index(n) if n in MARKS else 9):
        x, y = middle(found.places[name])
        width, height = 0.55 * FONT * len(name), 1.1 * FONT
        side = width / 2 + 8
        around = [(0.0, 11.0), (0.0, -11.0), (side, 0.0), (-side, 0.0)]
        around += [(s * side, t * 11.0) for s in (0.7, -0.7) for t in (1, -1)]
        around += [(0.0, 22.0), (0.0, -22.0)]
        costs = []
        for dx, dy in around:
            box = (x + dx, y + dy, width, height)
            outside = inside(box[0], width) * height + inside(box[1], height) * width
            costs.append(sum(_common(box, other) for other in boxes) + 4 * outside)
        dx, dy = chosen[name] = around[costs.index(min(costs))]
        boxes.append((x + dx, y + dy, width, height))
    return chosen


def _common(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> float:
    """Area that two boxes (centre x, y, width, height) share."""
    wide = (first[2] + second[2]) / 2 - abs(first[0] - second[0])
    high = (first[3] + second[3]) / 2 - abs(first[1] - second[1])
    return max(0.0, wide) * max(0.0, high)
