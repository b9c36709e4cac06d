"""WUDI against the published loop written out: the loss through autograd, torch's Adam."""

import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.starting import wudi


def defined_wudi(deltas, steps, lr):
    merged = deltas.sum(dim=0).clone().requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        loss = 0
        for delta in deltas:
            loss = loss + ((merged - delta) @ delta.T).square().sum() / delta.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return merged.detach()


def defined_loss(merged, deltas):
    terms = [((merged - d) @ d.T).square().sum() / d.square().sum() for d in deltas]
    return float(sum(terms))


def draw(kind, tasks, rows, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind == "lora":
        return 1e-3 * torch.stack(
            [
                torch.randn(rows, 4, generator=g) @ torch.randn(4, columns, generator=g)
                for _ in range(tasks)
            ]
        )
    return 1e-3 * torch.randn(tasks, rows, columns, generator=g)


def relative(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


SHAPES = [
    ("full", 4, 40, 60),
    ("full", 3, 60, 40),
    ("full", 2, 10, 64),
    ("full", 1, 12, 20),
    ("lora", 4, 64, 72),
    ("lora", 3, 72, 64),
]


@pytest.mark.parametrize(("kind", "tasks", "rows", "columns"), SHAPES)
def test_float64_follows_the_published_trajectory(kind, tasks, rows, columns):
    deltas = draw(kind, tasks, rows, columns).double()
    exact = defined_wudi(deltas, 300, 1e-5)
    if tasks > 1:
        assert relative(deltas.sum(dim=0), exact) > 1e-3, "nothing moved: the test would be empty"
    assert relative(wudi(deltas), exact) < 1e-10


@pytest.mark.parametrize(("kind", "tasks", "rows", "columns"), SHAPES)
def test_float32_ends_where_float64_does(kind, tasks, rows, columns):
    deltas = draw(kind, tasks, rows, columns)
    exact = defined_wudi(deltas.double(), 300, 1e-5)
    result = wudi(deltas)
    assert result.dtype == torch.float32
    assert relative(result, exact) < 1e-6


@pytest.mark.parametrize("steps", [0, 1, 2, 17])
def test_every_length_of_run(steps):
    deltas = draw("full", 3, 20, 30).double()
    exact = defined_wudi(deltas, steps, 2e-5)
    assert relative(wudi(deltas, steps=steps, lr=2e-5), exact) < 1e-12


def test_strips_cover_a_wide_matrix(monkeypatch):
    """Width over several strips of A, the last one narrower."""
    import sys

    monkeypatch.setattr(sys.modules["fda_fast.starting.wudi"], "_STRIP", 24)
    deltas = draw("full", 4, 50, 100).double()
    assert relative(wudi(deltas, steps=20), defined_wudi(deltas, 20, 1e-5)) < 1e-12


def test_loss_goes_down():
    deltas = draw("full", 4, 30, 40).double()
    assert defined_loss(wudi(deltas), deltas) < 0.7 * defined_loss(deltas.sum(dim=0), deltas)


def test_tasks_that_do_not_interfere_are_simply_added():
    """Rows in different coordinates: the gradient is zero exactly, whatever the rounding."""
    deltas = torch.zeros(2, 6, 10)
    deltas[0, :, :5] = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    deltas[1, :, 5:] = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(wudi(deltas), deltas.sum(dim=0))


def test_one_task_gives_itself_back():
    deltas = draw("full", 1, 8, 9)
    assert torch.equal(wudi(deltas), deltas[0])


def test_zero_task_vectors_are_left_out():
    deltas = draw("full", 2, 8, 9)
    with_zero = torch.cat([deltas[:1], torch.zeros(1, 8, 9), deltas[1:]])
    assert torch.equal(wudi(with_zero), wudi(deltas))
    assert torch.equal(wudi(torch.zeros(3, 8, 9)), torch.zeros(8, 9))


def test_inputs_are_not_changed():
    deltas = draw("full", 3, 8, 9)
    before = deltas.clone()
    wudi(deltas)
    assert torch.equal(deltas, before)
    single = draw("full", 1, 8, 9).double()
    before = single.clone()
    wudi(list(single)).add_(1)
    assert torch.equal(single, before)


def test_half_precision_task_vectors_are_merged_in_float32():
    deltas = draw("full", 2, 8, 9).bfloat16()
    assert torch.equal(wudi(deltas), wudi(deltas.float()))


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="steps"):
        wudi(torch.ones(2, 3, 4), steps=-1)
    with pytest.raises(InputError, match="finite"):
        wudi([torch.ones(3, 4), torch.full((3, 4), float("nan"))])
    with pytest.raises(InputError, match="matrices"):
        wudi(torch.ones(2, 3))
