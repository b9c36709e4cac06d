"""Mixtures of experts: every expert's MLP is a layer, the model around them loads as before."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fda_fast import collect_activations, merge
from fda_fast.checkpoints.described import DescribedCheckpoint
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

SMALL: dict[str, Any] = {"anchors": 8, "steps": 4, "epochs": 3, "device": "cpu", "progress": False}
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED: dict[str, Any] = {**SIZES, "num_experts": 3, "moe_intermediate_size": 8}
FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=3, **SIZES)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(shared_expert_intermediate_size=12, **ROUTED)
    ),
    # Every second layer is dense.
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(head_dim=4, decoder_sparse_step=2, **ROUTED)
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(num_experts=3, **SIZES)),
}
# Layers: three experts each; Qwen2's shared expert; Qwen3's dense layer in place of three experts.
LAYERS = {"mixtral": 6, "qwen2_moe": 8, "qwen3_moe": 4, "olmoe": 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Path]]]:
    """A family's tiny pretrained model and two fine-tunes, made at first use."""
    root = tmp_path_factory.mktemp("mixtures")

    def made(family: str) -> tuple[Path, list[Path]]:
        base, experts = root / family, [root / f"{family}-a", root / f"{family}-b"]
        if not base.exists():
            torch.manual_seed(4)
            model = FAMILIES[family]()
            model.save_pretrained(base)
            for path in experts:
                expert = copy.deepcopy(model)
                with torch.no_grad():
                    for p in expert.parameters():
                        p.add_(0.1 * p.std() * torch.randn_like(p))
                expert.save_pretrained(path)
        return base, experts

    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_expert(name: str) -> bool:
    return ".experts." in name or "shared_expert." in name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_loads_and_moves_the_experts_alone(
    models, tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    base, experts = models(family)
    caplog.set_level(logging.WARNING, "fda_fast")
    report = merge(base, experts, tmp_path / "out", outside="pretrained", **SMALL)
    assert not [r for r in caplog.records if "autograd" in r.message]
    assert len(report.layers) == LAYERS[family]
    before, after = weights(base), weights(tmp_path / "out")
    assert list(before) == list(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    dense = {n for n in before if family == "qwen3_moe" and ".layers.0.mlp." in n}
    assert moved == {name for name in before if is_expert(name)} | dense
    assert not any("copied as they are" in note for note in report.notes)
    model, info = type(FAMILIES[family]()).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = tmp_path / "again"
    model.save_pretrained(again)
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, after[name]), name
    tokens = torch.randint(0, 40, (1, 6), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(model(input_ids=tokens).logits).all()


@pytest.mark.skipif(hf.__version__ < "5", reason="transformers 4 has no fused experts")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_built_expert_is_the_models_own(models, family: str) -> None:
    """Against transformers' own fused arithmetic, one expert at a time."""
    base, _ = models(family)
    layout = ModelLayout.from_checkpoint(Checkpoint.open(base))
    model = type(FAMILIES[family]()).from_pretrained(base)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    checked = 0
    for spec in layout.layers:
        if ".experts." not in spec.name:
            continue
        tensors = layout.base.read(spec.tensors.values())
        layer = layout.build(spec, {local: tensors[n] for local, n in spec.tensors.items()})
        number, index = int(spec.name.split(".")[1]), int(spec.name.rsplit(".", 1)[1])
        fused = model.model.layers[number].mlp.experts
        chosen = torch.full((5, 1), index)
        with torch.no_grad():
            expected = fused(x, chosen, torch.ones(5, 1))
            assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-7)
        checked += 1
    assert checked == (3 if family == "qwen3_moe" else 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_alone_describes_the_checkpoint(models, family: str) -> None:
    """So that a merge can be planned without weights."""
    base, _ = models(family)
    described, stored = DescribedCheckpoint(base / "config.json"), Checkpoint.open(base)
    assert {n: (i.shape, i.dtype) for n, i in described.names.items()} == {
        n: (i.shape, i.dtype) for n, i in stored.names.items()
    }
    ours, theirs = map(ModelLayout.from_checkpoint, (described, stored))
    assert [spec.parameters for spec in ours.layers] == [s.parameters for s in theirs.layers]


def test_an_expert_that_nothing_was_routed_to_is_kept(
    models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fda_fast import layerwork

    base, experts = models("mixtral")
    still = "model.layers.1.block_sparse_moe.experts.2."
    frozen = []
    for path in experts:
        copy_ = tmp_path / path.name
        hf.MixtralForCausalLM.from_pretrained(path).save_pretrained(copy_)
        tensors = weights(path)
        tensors |= {name: t for name, t in weights(base).items() if name.startswith(still)}
        save_file(tensors, copy_ / "model.safetensors", {"format": "pt"})
        frozen.append(copy_)
    constructed, adapted = set(), []
    group, adapt = layerwork._construct_group, layerwork.adapt

    def watched_group(inputs: Any, *rest: Any, **keywords: Any) -> Any:
        constructed.add(inputs.name)
        return group(inputs, *rest, **keywords)

    def watched_adapt(*arguments: Any, **keywords: Any) -> Any:
        adapted.append(1)
        return adapt(*arguments, **keywords)

    monkeypatch.setattr(layerwork, "_construct_group", watched_group)
    monkeypatch.setattr(layerwork, "adapt", watched_adapt)
    report = merge(base, frozen, tmp_path / "out", outside="pretrained", **SMALL)
    every = {layer.layer for layer in report.layers}
    assert constructed == every - {"layers.1.block_sparse_moe.experts.2"}
    assert len(adapted) == 5
    before, after = weights(base), weights(tmp_path / "out")
    kept = {name for name in before if is_expert(name) and torch.equal(before[name], after[name])}
    assert kept == {name for name in before if name.startswith(still)}
    assert report.layers[5].adaptation is None
    assert set(report.layers[5].tasks["mixtral-a"].cosines.values()) == {0.0}


def test_task_arithmetic_of_everything(models, tmp_path: Path) -> None:
    base, experts = models("qwen2_moe")
    merge(
        base, experts, tmp_path / "out", method="task_arithmetic", scaling=0.5, device="cpu",
        progress=False,
    )  # fmt: skip
    before, after, a, b = map(weights, (base, tmp_path / "out", *experts))
    for name, tensor in before.items():
        assert torch.allclose(after[name], (a[name] + b[name]) / 2, atol=1e-6), name
        assert tensor.shape == after[name].shape


def test_what_cannot_be_done_is_said(models, tmp_path: Path) -> None:
    base, experts = models("mixtral")
    with pytest.raises(InputError, match=r"mixture of experts.*scope 'mlp'"):
        merge(base, experts, tmp_path / "out", scope="block", **SMALL)
    with pytest.raises(InputError, match="router"):
        collect_activations(hf.MixtralForCausalLM.from_pretrained(base), [])
    last = ".1.block_sparse_moe.experts.2."
    fused = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(3, 48, 16)}
    tensors = weights(base)
    cases = {
        "incomplete": {n: t for n, t in tensors.items() if f"{last}w1" not in n},
        "fewer": {n: t for n, t in tensors.items() if last not in n},
        "fused": {n: t for n, t in tensors.items() if ".experts." not in n} | fused,
    }
    for name, damaged in cases.items():
        hf.MixtralForCausalLM.from_pretrained(base).save_pretrained(tmp_path / name)
        save_file(damaged, tmp_path / name / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="gate, up and down matrices"):
            ModelLayout.from_checkpoint(Checkpoint.open(tmp_path / name))
