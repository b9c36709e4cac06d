"""Real activations as extra anchors: what is collected, and what adaptation makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from fda_fast import collect_activations, merge, save_activations
from fda_fast.errors import InputError
from fda_fast.layers.call import call_layer

SMALL: dict[str, Any] = {
    "anchors": 6,
    "tokens": 3,
    "steps": 4,
    "epochs": 60,
    "adapt_lr": 1e-3,
    "device": "cpu",
    "progress": False,
}


def batches(count: int, tokens: int, vocabulary: int = 40) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {"input_ids": torch.randint(5, vocabulary, (4, tokens), generator=generator)}
        for _ in range(count)
    ]


def llama() -> hf.PreTrainedModel:
    torch.manual_seed(1)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def test_they_are_what_the_layers_take_in(tiny) -> None:
    model = hf.AutoModel.from_pretrained(tiny.experts[0]).train()
    inputs = batches(3, tokens=3)
    found = collect_activations(model, inputs, count=10)
    assert model.training
    assert list(found) == ["encoder.layer.0", "encoder.layer.1"]
    model.eval()
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states for batch in inputs]
    for index, name in enumerate(found):
        expected = torch.cat([batch[index] for batch in states])[:10]
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected)
    # A layer run on its own activations gives the model's next hidden state.
    output = call_layer(model.get_submodule("encoder.layer.0"), found["encoder.layer.0"])
    assert torch.allclose(output, found["encoder.layer.1"], atol=1e-5)


def test_mlps_of_decoders_give_vectors_and_blocks_the_first_tokens() -> None:
    model = llama()
    inputs = batches(2, tokens=7)
    vectors = collect_activations(model, inputs, count=20)
    assert {name: tuple(x.shape) for name, x in vectors.items()} == {
        "layers.0.mlp": (20, 16),
        "layers.1.mlp": (20, 16),
    }
    blocks = collect_activations(model, inputs, scope="block", tokens=5, layers=["layers.1"])
    assert {name: tuple(x.shape) for name, x in blocks.items()} == {"layers.1": (8, 5, 16)}
    with torch.no_grad():
        states = [model(**b, output_hidden_states=True).hidden_states[1] for b in inputs]
    assert torch.equal(blocks["layers.1"], torch.cat(states)[:, :5])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft says "gradient checkpointing"
def test_a_lora_expert_gives_its_own(tiny) -> None:
    from peft import PeftModel

    base = hf.AutoModel.from_pretrained(tiny.base)
    plain = collect_activations(base, batches(1, 3))
    adapted = collect_activations(PeftModel.from_pretrained(base, tiny.experts[2]), batches(1, 3))
    assert torch.equal(plain["encoder.layer.0"], adapted["encoder.layer.0"])
    assert not torch.equal(plain["encoder.layer.1"], adapted["encoder.layer.1"])


def test_inputs_that_cannot_be_used(tiny) -> None:
    model = hf.AutoModel.from_pretrained(tiny.base)
    padded = {**batches(1, 3)[0], "attention_mask": torch.tensor([[1, 1, 0]] * 4)}
    with pytest.raises(InputError, match="padding"):
        collect_activations(model, [padded])
    with pytest.raises(InputError, match=r"7 tokens at layer encoder\.layer\.0.*exactly 5"):
        collect_activations(model, batches(1, 7), tokens=5)
    with pytest.raises(InputError, match=r"3 tokens at layer layers\.0.*at least 5"):
        collect_activations(llama(), batches(1, 3), tokens=5, scope="block")
    with pytest.raises(InputError, match=r"'encoder\.layer\.9'.*encoder\.layer\.0"):
        collect_activations(model, batches(1, 3), layers=["encoder.layer.9"])
    with pytest.raises(InputError, match="no inputs reached it"):
        collect_activations(model, [])
    with pytest.raises(InputError, match="scope"):
        collect_activations(model, [], scope="all")  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_adaptation_fits_them(tiny, tmp_path: Path) -> None:
    """With them the merged layers answer the experts' real inputs better than without."""
    experts = tiny.experts[:2]
    activations = {}
    for path in experts:
        model = hf.AutoModel.from_pretrained(path)
        activations[path.name] = collect_activations(model, batches(3, 3))
        save_activations(tmp_path / "real", path.name, activations[path.name])
    plain = merge(tiny.base, experts, tmp_path / "plain", **SMALL)
    merge(tiny.base, experts, tmp_path / "with", extra_anchors=str(tmp_path / "real"), **SMALL)
    distance = {}
    for which in ("plain", "with"):
        merged = hf.AutoModel.from_pretrained(tmp_path / which)
        total = 0.0
        for path in experts:
            expert = hf.AutoModel.from_pretrained(path)
            for name, x in activations[path.name].items():
                with torch.no_grad():
                    ours = call_layer(merged.get_submodule(name), x).flatten(1)
                    theirs = call_layer(expert.get_submodule(name), x).flatten(1)
                total += (1 - torch.cosine_similarity(ours, theirs)).sum().item()
        distance[which] = total
    assert distance["with"] < 0.9 * distance["plain"]
    assert "real" in (tmp_path / "with" / "fda_config.yml").read_text()
    assert str(tmp_path) not in (tmp_path / "with" / "fda_config.yml").read_text()
    assert "extra_anchors" not in plain.settings


def test_one_experts_activations_are_enough_and_paths_follow_the_file(tiny, tmp_path: Path) -> None:
    from fda_fast.config import load
    from fda_fast.merge import run

    model = hf.AutoModel.from_pretrained(tiny.experts[0])
    save_activations(tmp_path / "real", "movie", collect_activations(model, batches(1, 3)))
    config = load(tiny.config(tmp_path, extra_anchors="real", steps=2, epochs=2))
    run(config, tmp_path / "with", device="cpu", progress=False)
    plain = load(tiny.config(tmp_path, steps=2, epochs=2))
    run(plain, tmp_path / "plain", device="cpu", progress=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "plain"))
    assert any(not torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "nothing for this merge"),
        ({"movie": {"encoder.layer.0": torch.zeros(2, 4, 32)}}, r"\[n, 3, 32\].*\[2, 4, 32\]"),
        ({"movie": {"encoder.layer.0": torch.full((2, 3, 32), float("nan"))}}, "NaN"),
        ({"other": {"encoder.layer.0": torch.zeros(2, 3, 32)}}, "nothing for this merge"),
    ],
)
def test_files_that_cannot_be_used(tiny, tmp_path: Path, files, message: str) -> None:
    (tmp_path / "real").mkdir()
    for task, activations in files.items():
        save_activations(tmp_path / "real", task, activations)
    with pytest.raises(InputError, match=message):
        merge(
            tiny.base, tiny.experts, tmp_path / "out", extra_anchors=str(tmp_path / "real"), **SMALL
        )
    assert not (tmp_path / "out").exists()
