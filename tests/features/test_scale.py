"""Sigma chosen on one layer: the best of several by the loss reached, the same every time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fda_fast import choose_scale, construct, init_anchors, merge
from fda_fast.config import parse
from fda_fast.errors import InputError

SMALL: dict[str, Any] = {
    "anchors": 6,
    "tokens": 3,
    "steps": 8,
    "epochs": 2,
    "device": "cpu",
    "progress": False,
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.linear = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


@pytest.fixture
def layers() -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(3)
    pretrained = Layer()
    experts = []
    for _ in range(2):
        expert = copy.deepcopy(pretrained)
        with torch.no_grad():
            for p in expert.parameters():
                p.add_(0.05 * torch.randn_like(p))
        experts.append(expert)
    return pretrained, experts


def test_the_chosen_sigma_is_the_one_with_the_lowest_loss(layers) -> None:
    pretrained, experts = layers
    found = choose_scale(pretrained, experts, (5, 3, 12), scales=(1e-3, 1e-1, 10.0), steps=12)
    expected = {}
    for scale in (1e-3, 1e-1, 10.0):
        losses = []
        for k, expert in enumerate(experts):
            generator = torch.Generator().manual_seed(k)
            start = init_anchors(expert, (5, 3, 12), "gaussian", 1.0, generator) * scale
            losses.append(construct(pretrained, expert, start, steps=12, progress=False).loss)
        expected[scale] = sum(losses) / 2
    assert found.losses == pytest.approx(expected, rel=1e-12)
    assert found.scale == min(expected, key=expected.__getitem__)
    assert len(set(found.losses.values())) == 3
    assert found == choose_scale(
        pretrained, experts, (5, 3, 12), scales=(1e-3, 1e-1, 10.0), steps=12
    )


@pytest.mark.parametrize("scales", [(), (0.0, 1.0), (float("inf"),)])
def test_unusable_candidates(layers, scales) -> None:
    with pytest.raises(InputError, match="scales"):
        choose_scale(layers[0], layers[1], (5, 3, 12), scales=scales)


def test_a_merge_uses_and_records_it(tiny, tmp_path: Path) -> None:
    automatic = merge(
        tiny.base, tiny.experts, tmp_path / "auto", init="gaussian", scale="auto", **SMALL,
        keep_anchors=True,
    )  # fmt: skip
    record = json.loads((tmp_path / "auto" / "fda_report.json").read_text())["scale"]
    chosen = record["chosen"]
    assert record["layer"] == "encoder.layer.1"
    assert record["steps"] == 8
    assert chosen == float(min(record["losses"], key=record["losses"].__getitem__))
    assert automatic.settings["construct"]["scale"] == chosen
    file = tmp_path / "auto" / "anchors" / "movie" / "encoder.layer.0.safetensors"
    with safe_open(file, "pt") as anchors:
        assert json.loads(anchors.metadata()["settings"])["scale"] == chosen
    merge(tiny.base, tiny.experts, tmp_path / "same", init="gaussian", scale=chosen, **SMALL)
    one, two = (tmp_path / name / "model.safetensors" for name in ("auto", "same"))
    assert one.read_bytes() == two.read_bytes()


def test_a_run_that_died_keeps_its_choice(tiny, tmp_path: Path, monkeypatch) -> None:
    from fda_fast import layerwork, startscale

    options = {**SMALL, "init": "gaussian", "scale": "auto"}
    merge(tiny.base, tiny.experts, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(layerwork, "adapt", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            merge(tiny.base, tiny.experts, tmp_path / "out", **options)
    searches = []
    search = startscale.choose_scale
    monkeypatch.setattr(
        startscale, "choose_scale", lambda *a, **k: searches.append(1) or search(*a, **k)
    )
    merge(tiny.base, tiny.experts, tmp_path / "out", **options)
    assert not searches
    for name in ("model.safetensors", "fda_report.json"):
        one, two = (tmp_path / folder / name for folder in ("whole", "out"))
        assert one.read_bytes() == two.read_bytes(), name


def test_what_configurations_may_say() -> None:
    def scale(value: object) -> object:
        models = [{"model": "m"}]
        content = {"merge_method": "fda", "base_model": "b", "models": models}
        return parse({**content, "parameters": {"scale": value}}).parameters.scale

    assert scale("auto") == "auto"
    assert scale(0.5) == 0.5
    for wrong in ("automatic", 0, -1, True, float("nan"), [1]):
        with pytest.raises(InputError, match=r"parameters\.scale: a positive number or auto"):
            scale(wrong)


def test_sigma_of_weight_rows_is_refused(tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="init: gaussian"):
        merge(tiny.base, tiny.experts, tmp_path / "out", init="weights", scale=0.1, **SMALL)
