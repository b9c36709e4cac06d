"""The device-side step: without a card, the same numbers as construct()'s own loop."""

import copy

import pytest
import torch
from torch import nn

import fda_fast
from fda_fast import layers
from fda_fast.layers.graph import AnchorOptimiser, step_runner


@pytest.fixture
def case():
    torch.manual_seed(0)
    pretrained = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    finetuned = [copy.deepcopy(pretrained) for _ in range(2)]
    with torch.no_grad():
        for layer in finetuned:
            for parameter in layer.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return pretrained, finetuned, torch.randn(2, 5, 6)


def test_same_trajectory_as_construct(case):
    pretrained, finetuned, start = case
    options = {"lr": 1e-2, "weight_decay": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    expected = fda_fast.construct(
        pretrained, finetuned, start, steps=12, engine="autograd", progress=False, **options
    )
    problem = layers.bind(pretrained, finetuned, shape=(5, 6), engine="autograd")
    optimiser = AnchorOptimiser(problem, start, steps=12, **options)
    run = step_runner(optimiser.step, "cpu")
    for _ in range(12):
        run()
    assert torch.equal(optimiser.history, expected.history)
    assert torch.equal(optimiser.best_anchors, expected.anchors)
    assert optimiser.best_loss.tolist() == expected.loss
    names = list(problem.parameter_names)
    for k, row in enumerate(optimiser.best_cosines.tolist()):
        assert dict(zip(names, row, strict=True)) == expected.cosines[k]


def test_start_is_not_written_to(case):
    pretrained, finetuned, start = case
    before = start.clone()
    problem = layers.bind(pretrained, finetuned, shape=(5, 6), engine="autograd")
    optimiser = AnchorOptimiser(problem, start, steps=2, lr=0.1)
    for _ in range(3):
        optimiser.step()
    assert torch.equal(start, before)
    # Two rows for three steps: the third went round to the first.
    assert not optimiser.history.isnan().any()
    assert not torch.equal(optimiser.anchors, start)


def test_a_step_on_the_cpu_is_not_wrapped():
    calls = []
    run = step_runner(lambda: calls.append(1), torch.device("cpu"))
    run()
    run()
    assert calls == [1, 1]
