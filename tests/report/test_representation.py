"""Distances of features, and the hooks that collect them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fda_fast.errors import InputError
from fda_fast.report import representation_bias
from fda_fast.report.representation import hidden_states


def test_by_hand() -> None:
    ours = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    theirs = torch.tensor([[4.0, 3.0], [1.0, 0.0]])
    found = representation_bias(ours, theirs)
    assert found.mean_absolute == pytest.approx(1.0)
    assert found.relative == pytest.approx((4 / 26) ** 0.5)
    assert found.cosine == pytest.approx((1 - 24 / 25 + 1) / 2)
    assert representation_bias(theirs, theirs).mean_absolute == 0


def test_refusals() -> None:
    with pytest.raises(InputError, match="features"):
        representation_bias(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(InputError, match="zero"):
        representation_bias(torch.ones(2, 3), torch.zeros(2, 3))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_hidden_states_are_what_layers_put_out() -> None:
    torch.manual_seed(0)
    model = Stack().train()
    batches = [{"x": torch.randn(2, 4, 3)}, {"x": torch.randn(1, 4, 3)}]
    found = hidden_states(model, batches, {"first": "layers.0", "last": "layers.2"})
    every = torch.cat([batch["x"].reshape(-1, 3) for batch in batches])
    torch.testing.assert_close(found["first"], model.layers[0](every).detach())
    torch.testing.assert_close(found["last"], model.layers[2](found["first"]).detach())
    assert model.layers[1].training  # left as it was, though dropout was off meanwhile
    assert not model.layers[0]._forward_hooks
    with pytest.raises(InputError, match="inputs"):
        hidden_states(model, [], {"first": "layers.0"})
