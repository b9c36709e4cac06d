"""LoRA adapters read directly equal what peft itself makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fda_fast.checkpoints.align import ExpertView, match_expert
from fda_fast.checkpoints.identity import check_differs
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

peft = pytest.importorskip("peft")

# peft calls a name that newer transformers deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
)

Family = Callable[[str], Path]
CLASSES = {
    "bert": hf.BertForMaskedLM,
    "gpt2": hf.GPT2LMHeadModel,
    "llama": hf.LlamaForCausalLM,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("bert", {"target_modules": ["query", "value"]}),
    "all linear": ("llama", {"target_modules": "all-linear", "r": 2, "lora_alpha": 16}),
    "rslora": ("llama", {"target_modules": ["up_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["up_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, "^model.layers.1.mlp.up_proj": 3},
            "alpha_pattern": {r".*layers\.2\..*up_proj": 1.5},
        },
    ),
    "gpt2's transposed weights": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    ),
    "biases": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "whole modules": (
        "llama",
        {"target_modules": ["up_proj"], "modules_to_save": ["down_proj", "lm_head"]},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "up_proj"]}),
}


def trained_adapter(base: Path, name: str, target: Path, options: dict[str, Any]) -> Any:
    """Save an adapter with every trainable tensor moved; return the peft model."""
    model = CLASSES[name].from_pretrained(base)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options})
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(target)
    return model


def view_of(base: Path, adapter: Path) -> ExpertView:
    opened = Checkpoint.open(base)
    layout = ModelLayout.from_checkpoint(opened)
    return match_expert(opened, Checkpoint.open(adapter, "expert x"), layout)


@pytest.mark.parametrize("case", CASES)
def test_equals_merge_and_unload(family: Family, tmp_path: Path, case: str) -> None:
    name, options = CASES[case]
    base = family(name)
    merged = trained_adapter(base, name, tmp_path / "a", options).merge_and_unload()
    expected = merged.state_dict()
    view = view_of(base, tmp_path / "a")
    theta0 = view.base.read(view.base.names)
    got = view.read(view.base.names)
    vectors = view.task_vectors(view.base.names)
    changed = set()
    for tensor in view.base.names:
        torch.testing.assert_close(got[tensor], expected[tensor], rtol=0, atol=2e-7)
        summed = theta0[tensor] + vectors[tensor]
        torch.testing.assert_close(got[tensor], summed, rtol=0, atol=2e-7)
        if not torch.equal(expected[tensor], theta0[tensor]):
            changed.add(tensor)
        else:
            assert not vectors[tensor].any()
    assert changed == set(view.changed)
    assert set(view.unchanged) == set(view.base.names) - changed
    at_hand = view.task_vectors(view.changed, theta0)
    assert all(torch.equal(at_hand[n], vectors[n]) for n in view.changed)
    factors = view.factors(view.base.names)
    for tensor, (left, right) in factors.items():
        torch.testing.assert_close(left @ right, vectors[tensor], rtol=1e-5, atol=1e-7)
        assert left.shape[1] < 16 and (left.shape[1] > 0) == bool(vectors[tensor].any())
    whole = {name for name in view.base.names if name not in factors}
    # These two hold some matrices whole, the embeddings because peft saves them along.
    matrices = {name for name in whole if vectors[name].dim() == 2}
    assert bool(matrices) == (case in ("whole modules", "embeddings"))


def test_task_vector_is_the_exact_product(family: Family, tmp_path: Path) -> None:
    trained_adapter(family("llama"), "llama", tmp_path / "a", {"target_modules": ["up_proj"]})
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    path = "base_model.model.model.layers.1.mlp.up_proj"
    a, b = stored[f"{path}.lora_A.weight"], stored[f"{path}.lora_B.weight"]
    name = "model.layers.1.mlp.up_proj.weight"
    got = view_of(family("llama"), tmp_path / "a").task_vectors([name])[name]
    assert torch.equal(got, (b @ a) * 2.0)
    assert torch.linalg.matrix_rank(got) == 4


def test_adapter_for_a_base_without_prefix(family: Family, tmp_path: Path) -> None:
    # Trained on BertForMaskedLM ("bert." in its names), given with a base that has none.
    trained_adapter(family("bert"), "bert", tmp_path / "a", {"target_modules": ["query"]})
    hf.BertModel.from_pretrained(family("bert")).save_pretrained(tmp_path / "base")
    view = view_of(tmp_path / "base", tmp_path / "a")
    assert view.changed == [f"encoder.layer.{i}.attention.self.query.weight" for i in range(3)]


def test_adapter_outside_the_layers_is_said(family: Family, tmp_path: Path) -> None:
    trained_adapter(family("llama"), "llama", tmp_path / "a", {"target_modules": ["q_proj"]})
    view = view_of(family("llama"), tmp_path / "a")  # a decoder: its MLPs are merged
    assert any("outside the merged layers" in note and "q_proj" in note for note in view.notes)
    with pytest.raises(InputError, match="identical to the base model in every layer"):
        check_differs(view, ModelLayout.from_checkpoint(view.base))


def test_untrained_adapter_is_identical_to_the_base(family: Family, tmp_path: Path) -> None:
    model = CLASSES["llama"].from_pretrained(family("llama"))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"])).save_pretrained(
        tmp_path / "a"
    )
    view = view_of(family("llama"), tmp_path / "a")
    with pytest.raises(InputError, match="identical"):
        check_differs(view, ModelLayout.from_checkpoint(view.base))


def edited(
    family: Family,
    tmp_path: Path,
    config: dict[str, Any] | None = None,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
) -> ExpertView:
    """The view of a good adapter with its config or tensors edited."""
    folder = tmp_path / "a"
    trained_adapter(family("llama"), "llama", folder, {"target_modules": ["up_proj"]})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if change is not None:
        weights = folder / "adapter_model.safetensors"
        save_file({n: t.clone() for n, t in change(load_file(weights)).items()}, weights)
    return view_of(family("llama"), folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "expected LORA, got 'LOHA'"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"use_dora": True}, "uses use_dora"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"r": 5}, "expected 5 by adapter_config.json, got 4"),
        ({"r": "4"}, "a positive number"),
        ({"lora_alpha": None}, "a positive number"),
        ({"lora_alpha": -1}, "a positive number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "at most three"),
        ({"alpha_pattern": {"*.x": 3}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, r"does not fit .*expected \[24, 16\].*got \[16, 24\]"),
    ],
)
def test_refused_configs(
    family: Family, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        edited(family, tmp_path, config)


def test_real_dora_is_refused(family: Family, tmp_path: Path) -> None:
    options = {"target_modules": ["up_proj"], "use_dora": True}
    trained_adapter(family("llama"), "llama", tmp_path / "a", options)
    with pytest.raises(InputError, match="use_dora"):
        view_of(family("llama"), tmp_path / "a")


def test_refused_tensors(family: Family, tmp_path: Path) -> None:
    half = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.*lora_A and lora_B"):
        edited(family, tmp_path, change=lambda ts: {n: t for n, t in ts.items() if n != half})

    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n.replace("layers.1", "layers.9"): t for n, t in tensors.items()}

    with pytest.raises(InputError, match=r"no model.layers.9.mlp.up_proj.weight"):
        edited(family, tmp_path, change=renamed)
    with pytest.raises(InputError, match=r"\[rank, in\]"):
        edited(family, tmp_path, change=lambda ts: ts | {half: torch.ones(24, 3)})
    with pytest.raises(InputError, match="changes no tensor"):
        edited(family, tmp_path, change=lambda ts: {"other": torch.ones(1)})


def test_adapter_as_the_base_is_refused(family: Family, tmp_path: Path) -> None:
    trained_adapter(family("llama"), "llama", tmp_path / "a", {"target_modules": ["up_proj"]})
    with pytest.raises(InputError, match="is an adapter"):
        ModelLayout.from_checkpoint(Checkpoint.open(tmp_path / "a"))
