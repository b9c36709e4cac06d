"""Experts by the base's names: heads, prefixes, dtypes, vocabularies, ties, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from fda_fast.checkpoints.align import (
    ExpertView,
    check_finite,
    match_expert,
    zero_task_vectors,
)
from fda_fast.checkpoints.identity import check_differs
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

from .conftest import TEXT, finetune, tensors_of

Make = Callable[..., Path]
Family = Callable[[str], Path]


def view_of(base: Path, expert: Path, **options: Any) -> ExpertView:
    opened = Checkpoint.open(base)
    layout = ModelLayout.from_checkpoint(opened)
    return match_expert(opened, Checkpoint.open(expert, "expert x"), layout, **options)


def layer_names(view: ExpertView) -> list[str]:
    layout = ModelLayout.from_checkpoint(view.base)
    return [name for spec in layout.layers for name in spec.parameters.values()]


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "vit", "clip", "gpt2", "llama", "qwen2", "gemma2"]
)
def test_plain_finetune_of_every_family(family: Family, expert: Make, name: str) -> None:
    base = family(name)
    view = view_of(base, expert(base))
    expected = finetune(tensors_of(base))
    assert set(view.changed) == set(expected)
    assert view.unchanged == view.ignored == view.notes == []
    got = view.read(view.changed)
    assert list(got) == view.changed
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    vectors = view.task_vectors(view.changed)
    assert all(torch.equal(v, expected[n] - tensors_of(base)[n]) for n, v in vectors.items())
    check_differs(view, ModelLayout.from_checkpoint(view.base))


def test_expert_without_prefix_and_with_a_head(family: Family, expert: Make) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        body = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
        extra = {"classifier.weight": torch.ones(5, 16), "classifier.bias": torch.ones(5)}
        return finetune(body) | extra | {"embeddings.position_ids": torch.arange(20)}

    view = view_of(family("bert"), expert(family("bert"), change))
    assert sorted(view.ignored) == [
        "classifier.bias",
        "classifier.weight",
        "embeddings.position_ids",
    ]
    assert all(name.startswith("cls.") for name in view.unchanged)
    assert any("classifier" in n and "position_ids" not in n for n in view.notes)
    assert any("cls." in n and "unchanged" in n for n in view.notes)
    name = "bert.encoder.layer.1.output.dense.weight"
    body = {n: t for n, t in tensors_of(family("bert")).items() if n.startswith("bert.")}
    assert torch.equal(view.read([name])[name], finetune(body)[name])
    # What the expert lacks is the base's, and its task vector zero.
    head = view.unchanged[0]
    assert torch.equal(view.read([head])[head], view.base.read([head])[head])
    assert not view.task_vectors([head])[head].any()


def test_real_head_model_against_a_plain_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(tmp_path / "base")
    model = hf.BertForSequenceClassification(hf.BertConfig(num_labels=7, **TEXT))
    model.save_pretrained(tmp_path / "expert")
    view = view_of(tmp_path / "base", tmp_path / "expert")
    assert view.unchanged == []
    assert sorted(view.ignored) == ["classifier.bias", "classifier.weight"]
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(view.read([name])[name], model.bert.state_dict()[name])


def test_heads_of_different_size_keep_the_bases(family: Family, expert: Make) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bigger = {
            "classifier.out_proj.weight": torch.ones(9, 16),
            "classifier.out_proj.bias": torch.ones(9),
        }
        return finetune(tensors) | bigger

    view = view_of(family("roberta"), expert(family("roberta"), change))
    assert view.unchanged == ["classifier.out_proj.bias", "classifier.out_proj.weight"]
    assert any("classifier.out_proj.weight (2 rows, not 9)" in note for note in view.notes)


def test_vocabulary_growth(family: Family, expert: Make) -> None:
    embed = "bert.embeddings.word_embeddings.weight"

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        grown = torch.cat([tensors[embed], torch.ones(3, 16)])
        return finetune(tensors) | {embed: grown, "cls.predictions.bias": torch.ones(43)}

    base, bigger = family("bert"), expert(family("bert"), change, vocab_size=43)
    view = view_of(base, bigger)
    assert any(f"{embed} (40 rows, not 43)" in note for note in view.notes)
    assert torch.equal(view.read([embed])[embed], view.base.read([embed])[embed])
    with pytest.raises(InputError, match=rf"{embed}.*\[40, 16\].*\[43, 16\]"):
        view_of(base, bigger, vocabulary="refuse")


def test_tied_head_stored_by_one_side_only(family: Family, expert: Make) -> None:
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    view = view_of(
        family("qwen2"),
        expert(family("qwen2"), lambda ts: {**finetune(ts), head: ts[embed].clone()}),
    )
    assert view.ignored == [head]
    assert view.unchanged == []
    both = expert(family("qwen2"), lambda ts: {**ts, head: ts[embed].clone()}, name="base")
    view = view_of(both, expert(family("qwen2"), name="other"))
    assert view.unchanged == [head]
    assert view.notes == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_and_said(family: Family, expert: Make, dtype: torch.dtype) -> None:
    base = family("llama")
    view = view_of(base, expert(base, lambda ts: {n: t.to(dtype) for n, t in finetune(ts).items()}))
    name = "model.layers.0.mlp.up_proj.weight"
    expected = finetune(tensors_of(base))[name].to(dtype)
    assert torch.equal(view.read([name])[name], expected.float())
    assert view.read([name])[name].dtype == torch.float32
    assert view.read([name], dtype=None)[name].dtype == dtype
    assert any(str(dtype)[6:] in note and "float32" in note for note in view.notes)


def test_expert_as_a_single_pickle(family: Family, tmp_path: Path) -> None:
    torch.save(finetune(tensors_of(family("bert"))), tmp_path / "expert.pt")
    view = view_of(family("bert"), tmp_path / "expert.pt")
    assert view.unchanged == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "roberta"}, "model_type.*expected bert, got roberta"),
        ({"hidden_size": 32}, "hidden_size.*expected 16, got 32"),
        ({"num_hidden_layers": 4}, "num_hidden_layers.*expected 3, got 4"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"hidden_act": "relu"}, "hidden_act.*expected gelu, got relu"),
    ],
)
def test_another_architecture_by_config(
    family: Family, expert: Make, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        view_of(family("bert"), expert(family("bert"), **config))


def test_nested_config_is_compared_too(family: Family, expert: Make) -> None:
    clip = family("clip")
    vision = Checkpoint.open(clip).config["vision_config"] | {"patch_size": 4}
    with pytest.raises(InputError, match=r"patch_size \(vision_config\).*expected 8, got 4"):
        view_of(clip, expert(clip, vision_config=vision))


def test_changed_rope_is_said_not_refused(family: Family, expert: Make) -> None:
    view = view_of(family("llama"), expert(family("llama"), rms_norm_eps=1e-4))
    assert any("rms_norm_eps is 1e-06" in note for note in view.notes)


def test_shape_mismatch_in_a_layer(family: Family, expert: Make) -> None:
    name = "bert.encoder.layer.2.intermediate.dense.weight"
    wrong = expert(family("bert"), lambda ts: ts | {name: torch.ones(25, 16)})
    with pytest.raises(InputError, match=rf"'{name}'.*expected \[24, 16\].*got \[25, 16\]"):
        view_of(family("bert"), wrong)


def test_shape_mismatch_outside_the_layers(family: Family, expert: Make) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    wrong = expert(family("bert"), lambda ts: ts | {name: torch.ones(40, 8)})
    with pytest.raises(InputError, match=rf"'{name}'.*expected \[40, 16\].*got \[40, 8\]"):
        view_of(family("bert"), wrong)


def test_tensor_of_a_layer_missing(family: Family, expert: Make) -> None:
    name = "bert.encoder.layer.2.output.dense.bias"
    lacking = expert(family("bert"), lambda ts: {n: t for n, t in ts.items() if n != name})
    with pytest.raises(InputError, match=f"lacks 1 tensor of the layers.*{name}"):
        view_of(family("bert"), lacking)


def test_a_model_with_nothing_in_common(family: Family, tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"lacks 48 tensors.*and 43 more.*names such as x"):
        view_of(family("bert"), tmp_path / "x.safetensors")


def test_one_tensor_under_two_names(family: Family, expert: Make) -> None:
    name = "bert.encoder.layer.2.output.dense.bias"
    double = expert(family("bert"), lambda ts: ts | {f"module.{name}": ts[name]})
    with pytest.raises(InputError, match="same tensor under two names"):
        view_of(family("bert"), double)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf(family: Family, expert: Make, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][3, 5] = value
        return tensors

    view = view_of(family("llama"), expert(family("llama"), change))
    view.read(["model.layers.0.mlp.up_proj.weight"])
    for read in (view.read, view.task_vectors):
        message = rf"'{name}' of the expert x has NaN or infinite values \(1\).*\[3, 5\]"
        with pytest.raises(InputError, match=message):
            read([name])


def test_check_finite_on_values_that_overflow_a_sum() -> None:
    check_finite("w", torch.full((1000,), 3e38), "base model")
    check_finite("w", torch.full((1000,), 65504.0, dtype=torch.float16), "base model")
    check_finite("w", torch.full((4,), 1.7e308, dtype=torch.float64), "base model")
    check_finite("ids", torch.arange(4), "base model")
    check_finite("w", torch.empty(0), "base model")
    with pytest.raises(InputError):
        check_finite("w", torch.tensor([math.inf, -math.inf]), "base model")
    with pytest.raises(InputError):
        check_finite("w", torch.tensor(math.nan, dtype=torch.bfloat16), "base model")


def test_expert_identical_to_base(family: Family, expert: Make) -> None:
    base = family("llama")
    layout = ModelLayout.from_checkpoint(Checkpoint.open(base))
    same = expert(base, lambda ts: ts, name="same")
    rounded = expert(base, lambda ts: {n: t.bfloat16() for n, t in ts.items()}, name="rounded")

    def outside(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t if ".mlp." in n else t + 1 for n, t in tensors.items()}

    for copy in (base, same, rounded, expert(base, outside, name="outside")):
        with pytest.raises(InputError, match="identical to the base model in every layer"):
            check_differs(view_of(base, copy), layout)
    for name in layer_names(view_of(base, base)):
        one = expert(base, lambda ts, n=name: ts | {n: ts[n] * 1.01}, name=name)
        check_differs(view_of(base, one), layout)


def test_zero_task_vector_in_one_tensor_is_named(family: Family, expert: Make) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    kept = expert(family("llama"), lambda ts: finetune(ts) | {name: ts[name]})
    view = view_of(family("llama"), kept)
    assert zero_task_vectors(view.task_vectors(layer_names(view))) == [name]


def test_at_hand_pretrained_gives_the_same(family: Family, expert: Make) -> None:
    view = view_of(family("bert"), expert(family("bert")))
    names = layer_names(view)
    pretrained = view.base.read(names)
    for got, expected in (
        (view.task_vectors(names, pretrained), view.task_vectors(names)),
        (view.read(names, pretrained=pretrained), view.read(names)),
    ):
        assert all(torch.equal(got[n], expected[n]) for n in names)
