"""A merged model as a LoRA adapter: PEFT loads it, and the error told is the error made."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from fda_fast import merge
from fda_fast.config import parse
from fda_fast.errors import InputError

SMALL: dict[str, Any] = {
    "anchors": 6,
    "tokens": 3,
    "steps": 4,
    "epochs": 3,
    "adapt_lr": 1e-3,
    "device": "cpu",
    "progress": False,
}


def with_adapter(base: hf.PreTrainedModel, folder: Path) -> hf.PreTrainedModel:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).merge_and_unload()


@pytest.mark.parametrize("rank", [2, 40])  # 40: more than any matrix has
def test_peft_loads_it_with_the_error_told(tiny, tmp_path: Path, rank: int) -> None:
    merge(tiny.base, tiny.experts, tmp_path / "out", out_lora={"rank": rank}, **SMALL)
    report = json.loads((tmp_path / "out" / "fda_report.json").read_text())["lora"]
    base, merged = load_file(tiny.base / "model.safetensors"), load_file(
        tmp_path / "out" / "model.safetensors"
    )  # fmt: skip
    model = with_adapter(hf.AutoModel.from_pretrained(tiny.base), tmp_path / "out" / "lora")
    adapted = model.state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert set(report["tensors"]) == changed
    lost = total = 0.0
    for name in changed:
        change = (merged[name] - base[name]).double()
        missing = (merged[name] - adapted[name]).double()
        relative = (missing.norm() / change.norm()).item()
        lost, total = lost + missing.square().sum(), total + change.square().sum()
        # Adding the change to a weight rounds at the size of the weight.
        rounding = 2**-23 * (base[name].norm() / change.norm()).item()
        assert report["tensors"][name] == pytest.approx(relative, abs=2 * rounding), name
        if change.dim() == 2:
            values = torch.linalg.svdvals(change)
            best = values[rank:].square().sum().sqrt() / values.square().sum().sqrt()
            assert report["tensors"][name] == pytest.approx(best.item(), abs=1e-6), name
        else:
            assert report["tensors"][name] == 1.0
    assert report["error"] == pytest.approx(math.sqrt(lost / total), abs=1e-5)
    again = merge(tiny.base, tiny.experts, tmp_path / "again", out_lora={"rank": rank}, **SMALL)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        one, two = (path / "lora" / name for path in (tmp_path / "out", again.output))
        assert one.read_bytes() == two.read_bytes()


def test_gpt2_stores_its_matrices_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = hf.GPT2Config(
        vocab_size=40, n_positions=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    for name in "ab":
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        model.save_pretrained(tmp_path / name)
    merge(
        tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out",
        method="task_arithmetic", scaling=0.5, out_lora={"rank": 16}, device="cpu", progress=False,
    )  # fmt: skip
    base = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    adapted = with_adapter(base, tmp_path / "out" / "lora").state_dict()
    merged = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        assert torch.allclose(adapted[name], merged[name], atol=1e-6)
    report = json.loads((tmp_path / "out" / "fda_report.json").read_text())["lora"]
    assert report["tensors"]["transformer.wte.weight"] == 1.0


def test_no_change_is_said(tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no linear layer of the merged model has changed"):
        merge(
            tiny.base, tiny.experts, tmp_path / "out", method="task_arithmetic", scaling=0.0,
            out_lora={"rank": 2}, device="cpu", progress=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_configurations_may_say() -> None:
    content = {"merge_method": "fda", "base_model": "b", "models": [{"model": "m"}]}
    assert parse({**content, "out_lora": {"rank": 8}}).out_lora.rank == 8
    with pytest.raises(InputError, match=r"out_lora\.ranks: unknown key.*Did you mean 'rank'"):
        parse({**content, "out_lora": {"ranks": 8}})
    with pytest.raises(InputError, match=r"out_lora\.rank"):
        parse({**content, "out_lora": {"rank": 0}})
