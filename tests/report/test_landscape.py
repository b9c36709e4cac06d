"""Planes in weight space against geometry by hand, losses against adaptation's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fda_fast.adapt import adapt
from fda_fast.errors import InputError
from fda_fast.report import Plane, adaptation_loss, landscape


def weights(*values: float) -> dict[str, torch.Tensor]:
    """Four weights in two tensors."""
    return {"w": torch.tensor(values[:3]).double(), "b": torch.tensor(values[3:]).double()}


ORIGIN, FIRST, SECOND = weights(1, 1, 1, 1), weights(4, 1, 1, 5), weights(1, 3, 1, 2)


def test_corners_have_the_coordinates_of_geometry() -> None:
    plane = Plane.through(ORIGIN, FIRST, SECOND)
    a, b = torch.tensor([3.0, 0, 0, 4]), torch.tensor([0.0, 2, 0, 1])
    along = float(a @ b / a.norm())
    assert plane.coordinates(ORIGIN) == pytest.approx((0, 0, 0))
    assert plane.coordinates(FIRST) == pytest.approx((5, 0, 0), abs=1e-7)
    across = math.sqrt(float(b @ b) - along**2)
    assert plane.coordinates(SECOND) == pytest.approx((along, across, 0), abs=1e-7)
    # The third weight moves nowhere in this plane.
    x, y, off = plane.coordinates(weights(1, 1, 8, 1))
    assert (x, y, off) == pytest.approx((0, 0, 7))


def test_weights_and_coordinates_are_inverse() -> None:
    plane = Plane.through(ORIGIN, FIRST, SECOND)
    for x, y in ((0.0, 0.0), (2.5, -1.0), (-3.0, 4.0)):
        assert plane.coordinates(plane.at(x, y)) == pytest.approx((x, y, 0), abs=1e-6)
    for name, tensor in plane.at(5, 0).items():
        torch.testing.assert_close(tensor, FIRST[name])


def test_three_points_on_a_line() -> None:
    with pytest.raises(InputError, match="not on one line"):
        Plane.through(ORIGIN, FIRST, weights(7, 1, 1, 9))


def test_a_bowl_is_round() -> None:
    """The squared distance from a point is, in the plane, x^2 + y^2 around it plus its height."""
    centre = weights(2, 2, 3, 1)

    def loss(at: dict[str, torch.Tensor]) -> float:
        return sum((at[n] - centre[n]).square().sum().item() for n in at)

    plane = Plane.through(ORIGIN, FIRST, SECOND)
    found = landscape(plane, loss, {"centre": centre, "second": SECOND}, resolution=7)
    place = found.places["centre"]
    assert place.loss == pytest.approx(0) and place.off > 1
    x, y = torch.meshgrid(found.x, found.y, indexing="xy")
    expected = (x - place.x) ** 2 + (y - place.y) ** 2 + place.off**2
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6)
    inside = found.places["second"]
    assert found.x[0] < inside.x < found.x[-1] and found.y[0] < inside.y < found.y[-1]


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
def test_the_loss_is_adaptations(distance: str) -> None:
    torch.manual_seed(0)
    base, *experts = (nn.Linear(6, 5).double() for _ in range(3))
    tasks = [(torch.randn(8, 6).double(), expert) for expert in experts]
    first: list[float] = []
    adapt(
        base,
        tasks,
        epochs=1,
        batch_size=16,
        distance=distance,
        on_epoch=lambda _, loss: first.append(loss.item()),
    )
    loss = adaptation_loss(base, tasks, distance)(dict(base.named_parameters()))
    assert loss - (distance == "cosine") == pytest.approx(first[0], rel=1e-9)
    perfect = adaptation_loss(base, tasks[:1], distance)(dict(experts[0].named_parameters()))
    assert perfect == pytest.approx(0, abs=1e-12)
