"""LoRA experts in a merge: their task vectors stay thin, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fda_fast import merge, pipeline
from fda_fast.anchors import Anchors
from fda_fast.config import parse
from fda_fast.job import prepare
from fda_fast.layers.factored import factors_of

SMALL: dict[str, Any] = {
    "anchors": 6,
    "tokens": 3,
    "steps": 8,
    "epochs": 2,
    "device": "cpu",
    "progress": False,
}


def test_a_layer_that_is_read_knows_its_factors(tiny) -> None:
    models = [{"model": str(path)} for path in tiny.experts]
    job = prepare(parse({"merge_method": "fda", "base_model": str(tiny.base), "models": models}))
    inputs = pipeline.read_layer(job, 1)
    job.close()
    base = dict(inputs.pretrained.named_parameters())
    for name, parameter in inputs.finetuned["lora"].named_parameters():
        assert factors_of(inputs.finetuned["movie"], name) is None
        known = factors_of(inputs.finetuned["lora"], name)
        if parameter.dim() != 2:
            assert known is None
            continue
        left, right = known
        assert left.shape[1] == (0 if "key" in name else 4)
        rounding = torch.finfo(torch.float32).eps * base[name].abs().max()
        difference = (parameter - base[name]).detach()
        assert torch.allclose(left @ right, difference, rtol=0, atol=rounding.item())


def test_anchors_are_those_of_the_formed_product(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = tiny.experts[2:]
    merge(tiny.base, lora, tmp_path / "thin", keep_anchors=True, **SMALL)
    monkeypatch.setattr(pipeline, "attach_factors", lambda *_: None)
    merge(tiny.base, lora, tmp_path / "formed", keep_anchors=True, **SMALL)
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        thin, formed = (
            Anchors.load(tmp_path / which / "anchors" / "lora" / f"{layer}.safetensors")
            for which in ("thin", "formed")
        )
        assert not torch.equal(thin.tensor, formed.tensor), "the factors must have been used"
        assert thin.loss == pytest.approx(formed.loss, rel=1e-5)
        assert torch.allclose(thin.tensor, formed.tensor, rtol=1e-3, atol=1e-4)
