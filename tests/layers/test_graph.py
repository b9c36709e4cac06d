"""The device-side step without a card; tests/test_construct.py holds it to the published loop."""

import copy

import pytest
import torch
from torch import nn

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
