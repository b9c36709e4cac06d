"""Early stop and AdamW's moments: by task, whatever its batch; off unless asked for; recorded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fda_fast import construct, merge
from fda_fast.config import parse
from fda_fast.errors import InputError

SMALL: dict[str, Any] = {
    "anchors": 6,
    "tokens": 3,
    "epochs": 1,
    "device": "cpu",
    "progress": False,
}


@pytest.fixture
def problem() -> tuple[nn.Module, list[nn.Module], torch.Tensor]:
    torch.manual_seed(0)
    pretrained = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 10)).double()
    experts = []
    for size in (0.3, 0.01):
        expert = copy.deepcopy(pretrained)
        with torch.no_grad():
            for p in expert.parameters():
                p.add_(size * torch.randn_like(p))
        experts.append(expert)
    return pretrained, experts, 0.5 * torch.randn(2, 8, 10, dtype=torch.float64)


def test_a_task_stops_at_the_same_step_in_any_batch(problem) -> None:
    pretrained, experts, anchors = problem
    options = {"steps": 400, "lr": 0.05, "patience": 5, "tolerance": 0.005, "progress": False}
    both = construct(pretrained, experts, anchors, **options)
    alone = [construct(pretrained, e, x, **options) for e, x in zip(experts, anchors, strict=True)]
    assert both.steps == [found.steps for found in alone]
    assert len(set(both.steps)) == 2, "the case must have two tasks that stop at different steps"
    assert max(both.steps) == len(both.history) < 400
    for k, found in enumerate(alone):
        assert len(found.history) == found.steps
        assert both.loss[k] == pytest.approx(found.history.min().item(), rel=1e-9)
        assert torch.allclose(both.anchors[k], found.anchors, rtol=1e-9, atol=1e-12)
        assert both.cosines[k] == pytest.approx(found.cosines, rel=1e-9)


def test_all_steps_without_patience(problem) -> None:
    pretrained, experts, anchors = problem
    found = construct(pretrained, experts, anchors, steps=7, lr=0.0, progress=False)
    assert found.steps == [7, 7]


def test_a_merge_records_where_it_stopped(tiny, tmp_path: Path) -> None:
    plain = merge(tiny.base, tiny.experts, tmp_path / "plain", steps=12, **SMALL)
    assert plain.settings["construct"]["patience"] is None
    assert plain.settings["construct"]["betas"] == (0.9, 0.999)
    assert plain.layers[0].tasks["movie"].steps is None
    # A rate too small to improve anything by the tolerance: two windows of three steps.
    early = merge(
        tiny.base, tiny.experts, tmp_path / "early", steps=12, lr=1e-9, patience=3,
        betas=[0.9, 0.95],
        keep_anchors=True, **SMALL,
    )  # fmt: skip
    assert early.settings["construct"]["betas"] == (0.9, 0.95)
    assert early.layers[0].tasks["movie"].steps == 6
    report = json.loads((tmp_path / "early" / "fda_report.json").read_text())
    assert report["layers"][1]["tasks"]["news"]["steps"] == 6
    assert report["settings"]["construct"]["patience"] == 3


def test_what_configurations_may_say() -> None:
    def parameters(**given: object) -> Any:
        models = [{"model": "m"}]
        content = {"merge_method": "fda", "base_model": "b", "models": models}
        return parse({**content, "parameters": given}).parameters

    assert parameters(betas=[0.9, 0.95], patience=50).betas == (0.9, 0.95)
    for wrong in ([0.9], [0.9, 1.0], 0.9, [True, 0.5], "0.9"):
        with pytest.raises(InputError, match=r"parameters\.betas: two numbers"):
            parameters(betas=wrong)
    with pytest.raises(InputError, match=r"parameters\.patience"):
        parameters(patience=0)
