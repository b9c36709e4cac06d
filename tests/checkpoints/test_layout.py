"""Layers are found in every family, and a built layer is the layer of the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.repeated import repeated_layers
from fda_fast.errors import InputError

from .conftest import TEXT, rewrite, tensors_of

Family = Callable[[str], Path]
DECODERS = ("gpt2", "llama", "qwen2", "gemma2")
# transformers 4 spreads ViT's MLP over two modules of the block, as BERT's is everywhere.
WITHOUT_MLP = ("bert", "roberta", "vit") if hf.__version__ < "5" else ("bert", "roberta")
FAMILIES = ("bert", "roberta", "vit", "clip", *DECODERS)


def layout_of(path: Path, scope: Any = "auto") -> ModelLayout:
    return ModelLayout.from_checkpoint(Checkpoint.open(path), scope)


def built(layout: ModelLayout, index: int) -> nn.Module:
    spec = layout.layers[index]
    tensors = layout.base.read(spec.tensors.values())
    return layout.build(spec, {local: tensors[name] for local, name in spec.tensors.items()})


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_and_the_rest_make_the_whole(family: Family, name: str) -> None:
    layout = layout_of(family(name))
    decoder = name in DECODERS
    assert layout.decoder is decoder
    assert len(layout.layers) == (6 if name == "clip" else 3)
    inside = [tensor for spec in layout.layers for tensor in spec.parameters.values()]
    assert len(inside) == len(set(inside))
    assert set(inside) | set(layout.outside) == set(layout.base.names)
    assert not set(inside) & set(layout.outside)
    assert any("embed" in n or "wte" in n for n in layout.outside)
    for spec in layout.layers:
        assert spec.width == 16
        assert spec.scope == ("mlp" if decoder else "block")
        assert spec.name.endswith(".mlp") is decoder
        for local, tensor in spec.parameters.items():
            assert layout.base.names[tensor].shape == spec.shapes[local]
        assert spec.numel == sum(layout.base.names[t].numel for t in spec.parameters.values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scope", ["block", "mlp"])
def test_built_layer_equals_the_models_own(family: Family, name: str, scope: str) -> None:
    if name in WITHOUT_MLP and scope == "mlp":
        with pytest.raises(InputError, match=r"has no MLP module.*scope 'block'"):
            layout_of(family(name), scope)
        return
    layout = layout_of(family(name), scope)
    model = getattr(hf, layout.base.config["architectures"][0]).from_pretrained(family(name))
    model = getattr(model, model.base_model_prefix, model)
    for index, spec in enumerate(layout.layers):
        layer, own = built(layout, index), model.get_submodule(spec.name)
        assert type(layer) is type(own)
        assert not layer.training
        expected = dict(own.named_parameters())
        assert [n for n, _ in layer.named_parameters()] == list(spec.parameters) == list(expected)
        for local, parameter in layer.named_parameters():
            assert parameter.dtype == torch.float32
            assert parameter.requires_grad
            assert torch.equal(parameter, expected[local])
        assert not any(b.is_meta for b in layer.buffers())
    if scope == "mlp":
        x = torch.randn(5, spec.width)
        assert torch.equal(layer(x), own.eval()(x))


def test_clip_has_both_towers(family: Family) -> None:
    layers = layout_of(family("clip")).layers
    assert [spec.name.split(".")[0] for spec in layers] == ["text_model"] * 3 + ["vision_model"] * 3


def test_gpt2_blocks_can_be_asked_for(family: Family) -> None:
    assert [spec.name for spec in layout_of(family("gpt2"), "block").layers] == [
        "h.0",
        "h.1",
        "h.2",
    ]


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n.removeprefix("bert."),
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.module.{n}",
        lambda n: f"model.{n}",
        lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
    ],
    ids=["no prefix", "DataParallel", "compiled", "trainer", "gamma and beta"],
)
def test_other_names_are_matched(
    family: Family, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    changed = rewrite(
        family("bert"), tmp_path / "m", lambda ts: {rename(n): t for n, t in ts.items()}
    )
    layout, plain = layout_of(changed), layout_of(family("bert"))
    for ours, theirs in zip(layout.layers, plain.layers, strict=True):
        assert ours.name == theirs.name
        assert {k: rename(v) for k, v in theirs.parameters.items()} == ours.parameters
    assert torch.equal(*(next(built(x, 1).parameters()) for x in (layout, plain)))


def test_computed_buffers_have_their_values(tmp_path: Path) -> None:
    # GPT-Neo's attention keeps its causal mask in a buffer that no checkpoint holds.
    config = hf.GPTNeoConfig(
        vocab_size=40,
        max_position_embeddings=12,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf.GPTNeoForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "neo")
    layout = layout_of(tmp_path / "neo", "block")
    for index, spec in enumerate(layout.layers):
        layer, own = built(layout, index), model.transformer.get_submodule(spec.name)
        buffers = dict(own.named_buffers())
        assert buffers
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, buffers[name])


def test_build_shares_float32_and_converts_the_rest(family: Family) -> None:
    layout = layout_of(family("llama"))
    spec = layout.layers[0]
    stored = layout.base.read(spec.tensors.values())
    tensors = {local: stored[name] for local, name in spec.tensors.items()}
    layer = layout.build(spec, tensors)
    name, parameter = next(layer.named_parameters())
    assert parameter.data_ptr() == tensors[name].data_ptr()
    halves = layout.build(spec, {n: t.bfloat16() for n, t in tensors.items()})
    assert {p.dtype for p in halves.parameters()} == {torch.float32}
    double = layout.build(spec, tensors, dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_build_refuses_what_does_not_fit(family: Family) -> None:
    layout = layout_of(family("llama"))
    spec = layout.layers[0]
    stored = layout.base.read(spec.tensors.values())
    tensors = {local: stored[name] for local, name in spec.tensors.items()}
    name = next(iter(tensors))
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {name: tensors[name][:1]},
        tensors | {"extra": tensors[name]},
    ):
        with pytest.raises(InputError, match=f"'{name}'|'extra'"):
            layout.build(spec, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, r"disagree on tensor .*by config\.json"),
        ({"intermediate_size": 64}, r"disagree on tensor .*\[64"),
        ({"vocab_size": 41}, r"disagree on tensor .*word_embeddings"),
        ({"num_hidden_layers": 2}, r"does not provide for.*2 layers.*layer\.2\."),
        ({"num_hidden_layers": 5}, r"of layer encoder\.layer\.3 .*are not in"),
        ({"model_type": "no_such"}, "'no_such'.*newer transformers"),
        ({"model_type": ["bert"]}, "model_type"),
        ({"num_attention_heads": 5}, "describes no model"),
        ({"num_hidden_layers": "many"}, "describes no model"),
    ],
)
def test_config_and_weights_disagreeing(
    family: Family, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = rewrite(family("bert"), tmp_path / "m", None, **change)
    with pytest.raises(InputError, match=message):
        layout_of(path)


def test_missing_config(family: Family) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        layout_of(family("bert") / "model.safetensors")


def test_remote_code_is_never_run(family: Family, tmp_path: Path) -> None:
    path = rewrite(
        family("bert"),
        tmp_path / "m",
        None,
        model_type="mine",
        auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    )
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="not run"):
        layout_of(path)
    assert not (tmp_path / "ran").exists()


def test_model_type_of_an_old_config(family: Family, tmp_path: Path) -> None:
    path = rewrite(family("bert"), tmp_path / "m", None, model_type=None, architectures=None)
    layout = layout_of(path)
    assert len(layout.layers) == 3
    assert any("taken for 'bert'" in note for note in layout.notes)


def test_encoder_decoder_takes_mlps_only(tmp_path: Path) -> None:
    config = hf.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, pad_token_id=0
    )
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="encoder-decoder"):
        layout_of(tmp_path / "t5", "block")
    layout = layout_of(tmp_path / "t5")
    assert len(layout.layers) == 4
    assert {spec.scope for spec in layout.layers} == {"mlp"}


def test_tied_twin_in_the_file_is_found(family: Family, tmp_path: Path) -> None:
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    path = rewrite(family("qwen2"), tmp_path / "a", lambda ts: {**ts, head: ts[embed].clone()})
    assert layout_of(path).tied in ({head: embed}, {embed: head})
    path = rewrite(family("qwen2"), tmp_path / "b", lambda ts: {**ts, head: ts[embed] + 1})
    assert layout_of(path).tied == {}
    assert layout_of(family("qwen2")).tied == {}


def test_an_unknown_tensor_is_carried_along(family: Family, tmp_path: Path) -> None:
    path = rewrite(family("bert"), tmp_path / "m", lambda ts: {**ts, "mine": torch.ones(2)})
    layout = layout_of(path)
    assert "mine" in layout.outside
    assert any("mine" in note for note in layout.notes)


def test_stages_give_way_to_the_layers_inside() -> None:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(width) for _ in range(2))
            self.down = nn.Linear(width, 2)

    model = nn.Module()
    model.stages = nn.ModuleList([Stage(8), Stage(16)])
    model.tiny = nn.ModuleList([nn.Linear(1, 1)])
    assert list(repeated_layers(model)) == ["stages.0.blocks", "stages.1.blocks"]


def test_weights_alone_say_what_the_model_is(family: Family) -> None:
    # The count of everything found equals what transformers counts.
    for name in FAMILIES:
        layout = layout_of(family(name))
        inside = sum(spec.numel for spec in layout.layers)
        outside = sum(layout.base.names[n].numel for n in layout.outside)
        assert inside + outside == sum(t.numel() for t in tensors_of(family(name)).values())
        assert TEXT["hidden_size"] == layout.layers[0].width
