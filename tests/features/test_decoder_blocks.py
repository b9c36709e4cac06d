"""Whole decoder layers merged: rotary positions from 0, causal, by the program, in every family."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from fda_fast import collect_activations, merge
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.layers.call import call_layer

SMALL: dict[str, Any] = {
    "scope": "block",
    "anchors": 4,
    "tokens": 6,
    "steps": 3,
    "epochs": 2,
    "device": "cpu",
    "progress": False,
}
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    # A window smaller than the anchors, so that it matters.
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(sliding_window=4, **SIZES)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(tie_word_embeddings=True, **SIZES)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(sliding_window=4, query_pre_attn_scalar=8, **SIZES)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(sliding_window=4, query_pre_attn_scalar=8, layer_types=KINDS, **SIZES)
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Path]]]:
    """A family's tiny pretrained model and two fine-tunes, made at first use."""
    root = tmp_path_factory.mktemp("decoders")

    def made(family: str) -> tuple[Path, list[Path]]:
        base, experts = root / family, [root / f"{family}-a", root / f"{family}-b"]
        if not base.exists():
            torch.manual_seed(4)
            model = FAMILIES[family]()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "norm" not in name:
                        p.mul_(10)  # of a trained model's size: attention that is not uniform
            model.save_pretrained(base)
            for path in experts:
                expert = copy.deepcopy(model)
                with torch.no_grad():
                    for p in expert.parameters():
                        p.add_(0.1 * (p.std() + 0.1) * torch.randn_like(p))
                expert.save_pretrained(path)
        return base, experts

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_alone_computes_what_it_does_in_the_model(models, family: str) -> None:
    base, _ = models(family)
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    taken = collect_activations(model, [tokens], scope="block")
    layout = ModelLayout.from_checkpoint(Checkpoint.open(base), "block")
    outputs = {}
    hooks = [
        model.model.get_submodule(spec.name).register_forward_hook(
            lambda _, args, output, name=spec.name: outputs.update({name: output})
        )
        for spec in layout.layers
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    for spec in layout.layers:
        tensors = layout.base.read(spec.tensors.values())
        layer = layout.build(spec, {local: tensors[n] for local, n in spec.tensors.items()})
        expected = outputs[spec.name]
        expected = expected[0] if isinstance(expected, tuple) else expected
        with torch.no_grad():
            found = call_layer(layer, taken[spec.name])
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), spec.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["pretrained", "task_arithmetic"])
def test_a_merge_by_the_program(
    models, tmp_path: Path, family: str, start: str, caplog: pytest.LogCaptureFixture
) -> None:
    base, experts = models(family)
    caplog.set_level(logging.WARNING, "fda_fast")
    report = merge(base, experts, tmp_path / "out", start=start, outside="pretrained", **SMALL)
    assert not [r.message for r in caplog.records if "autograd" in r.message]
    assert [layer.layer for layer in report.layers] == ["layers.0", "layers.1", "layers.2"]
    for layer in report.layers:
        cosines = layer.tasks[f"{family}-a"].cosines
        assert "self_attn.q_proj.weight" in cosines and "input_layernorm.weight" in cosines
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers." in name}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(model(tokens).logits).all()
