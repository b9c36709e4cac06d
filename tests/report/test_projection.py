"""Non-negative least squares by its optimality conditions; cones against ones by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from fda_fast.errors import InputError
from fda_fast.report import cone_projection, induced_updates
from fda_fast.report.nnls import nnls


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, columns, generator=generator, dtype=torch.double),
        torch.randn(rows, generator=generator, dtype=torch.double),
    )


@pytest.mark.parametrize("seed", range(8))
def test_every_active_set_tried(seed: int) -> None:
    matrix, target = problem(12, 6, seed)
    found = nnls(matrix.T @ matrix, matrix.T @ target)
    best = target.norm().item()
    for size in range(1, 7):
        for columns in itertools.combinations(range(6), size):
            part = matrix[:, list(columns)]
            solution = torch.linalg.lstsq(part, target[:, None]).solution[:, 0]
            if bool((solution >= 0).all()):
                best = min(best, (part @ solution - target).norm().item())
    assert bool((found >= 0).all())
    assert (matrix @ found - target).norm().item() == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("rows, columns", [(200, 60), (20, 60), (60, 60)])
def test_optimality_conditions(rows: int, columns: int) -> None:
    """Also with more columns than rows: then many solutions, and every one has these."""
    matrix, target = problem(rows, columns, 3)
    found = nnls(matrix.T @ matrix, matrix.T @ target)
    gradient = matrix.T @ (matrix @ found - target)
    scale = (matrix.T @ target).abs().max()
    assert bool((found >= 0).all())
    assert gradient.min() >= -1e-9 * scale
    assert (gradient * found).abs().max() <= 1e-9 * scale


def test_equal_and_zero_columns() -> None:
    matrix, target = problem(12, 3, 1)
    matrix = torch.cat([matrix, matrix, torch.zeros(12, 2).double()], 1)
    found = nnls(matrix.T @ matrix, matrix.T @ target)
    single = nnls(matrix[:, :3].T @ matrix[:, :3], matrix[:, :3].T @ target)
    torch.testing.assert_close(found[:3] + found[3:6], single)
    assert not found[6:].any()


def test_cones_by_hand() -> None:
    axes = [{"w": torch.tensor([1.0, 0.0]), "b": torch.zeros(1)},
            {"w": torch.tensor([0.0, 2.0]), "b": torch.zeros(1)}]  # fmt: skip
    inside = cone_projection({"w": torch.tensor([3.0, 4.0]), "b": torch.zeros(1)}, axes)
    assert inside.ratio == pytest.approx(1)
    torch.testing.assert_close(inside.coefficients, torch.tensor([3.0, 2.0]).double())
    outside = cone_projection({"w": torch.tensor([1.0, 0.0]), "b": torch.ones(1)}, axes)
    assert outside.ratio == pytest.approx(math.sqrt(0.5))
    behind = cone_projection({"w": torch.tensor([-1.0, -1.0]), "b": torch.zeros(1)}, axes)
    assert behind.ratio == 0 and not behind.coefficients.any()


def test_updates_sum_to_the_gradient_of_the_distance() -> None:
    torch.manual_seed(0)
    base, expert = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    inputs = torch.randn(9, 5).double()
    made = induced_updates(base, expert, inputs, count=4, distance="l2")
    assert len(made) == 4
    distance = (base(inputs) - expert(inputs).detach()).square().sum()
    for (name, parameter), gradient in zip(
        base.named_parameters(),
        torch.autograd.grad(distance, list(base.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(sum(u[name] for u in made), -gradient)
        assert parameter.grad is None
    # Each of them lies in the cone that it spans with the others.
    assert cone_projection(made[0], made).ratio == pytest.approx(1)


def test_refusals() -> None:
    update = {"w": torch.ones(2)}
    with pytest.raises(InputError, match="at least one"):
        cone_projection(update, [])
    with pytest.raises(InputError, match="tensor w"):
        cone_projection(update, [{"w": torch.ones(3)}])
    with pytest.raises(InputError, match="zero"):
        cone_projection({"w": torch.zeros(2)}, [update])
