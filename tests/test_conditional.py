"""mergekit's filters and gradients: grammar, values, and what merges make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fda_fast
from fda_fast.conditional import chain, covers, evaluate, layer_positions, parse_setting
from fda_fast.config import load, parse
from fda_fast.errors import InputError

FILTERS = [{"filter": "mlp", "value": 0.5}, {"filter": "attn", "value": [0, 1]}, {"value": 2}]


def test_the_first_condition_that_takes_a_tensor_counts() -> None:
    setting = parse_setting(FILTERS)
    assert evaluate(setting, "layers.0.mlp.up", 0.3) == 0.5
    assert evaluate(setting, "layers.0.attn.q", 0.25) == 0.25
    assert evaluate(setting, "norm", 0.25) == 2
    assert evaluate(parse_setting([{"filter": "*", "value": 3}]), "anything", 0) == 3
    assert evaluate(parse_setting({"value": 3}), "anything", 0) == 3
    assert evaluate(parse_setting(FILTERS[:1]), "norm", 0) is None
    assert parse_setting("1e-2") == 0.01


def test_gradients_run_over_the_layers_of_each_stack() -> None:
    names = [f"encoder.layer.{i}.w" for i in range(5)] + ["text.blocks.0.w", "embed.w"]
    positions = layer_positions(names)
    gradient = parse_setting([0, 1, 0])
    found = [evaluate(gradient, n, positions.get(n, 0.0)) for n in names]
    assert found == [0, 0.5, 1, 0.5, 0, 0, 0]


def test_chains_fall_through() -> None:
    own, whole = parse_setting(FILTERS[:1]), parse_setting([1.0, 3.0])
    both = chain(own, whole)
    assert both is not None and covers(both) and not covers(own)
    assert evaluate(both, "mlp", 0.5) == 0.5 and evaluate(both, "norm", 0.5) == 2
    assert chain(2.0, own) == 2.0 and chain(None, own) == own and chain(own, None) == own


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "an empty list"),
        ([{"filter": "mlp"}], "expected {filter"),
        ([{"value": 1}, 2], "expected {filter"),
        ([{"value": 1, "else": 2}], "expected {filter"),
        ([{"value": 1, "filter": 2}], "a filter is a part of tensor names"),
        (["mlp"], "a word where a number belongs"),
        (True, "expected a number"),
        (float("inf"), "finite"),
        ([{"value": 1, "filter": "a"}], "end its filters with"),
    ],
)
def test_refusals(value: object, said: str) -> None:
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "b",
        "models": [{"model": "m", "parameters": {"weight": value}}],
    }
    with pytest.raises(InputError, match=said):
        parse(content)


def test_a_merge_follows_them(tiny, tmp_path: Path) -> None:
    weight = [{"filter": "attention", "value": [1.0, 0.25]}, {"value": 0.5}]
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(tiny.base),
        "models": [{"model": str(tiny.experts[0]), "parameters": {"weight": weight}}],
        "parameters": {"lambda": [{"filter": "output", "value": 0.5}, {"value": 1}]},
    }
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(content))
    from fda_fast.merge import run

    run(load(path), tmp_path / "out", progress=False)
    base, expert, merged = (
        load_file(folder / "model.safetensors")
        for folder in (tiny.base, tiny.experts[0], tmp_path / "out")
    )
    for name, factor in {
        "encoder.layer.0.attention.self.query.weight": 1.0,
        "encoder.layer.1.attention.self.query.weight": 0.25,
        "encoder.layer.1.attention.output.dense.weight": 0.125,
        "encoder.layer.1.intermediate.dense.weight": 0.5,
        "embeddings.LayerNorm.weight": 0.5,
    }.items():
        expected = base[name].double() + factor * (expert[name].double() - base[name])
        assert torch.allclose(merged[name].double(), expected, atol=1e-7), name
    written = (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert yaml.safe_load(written)["models"][0]["parameters"]["weight"] == weight
    assert written == (tmp_path / "out" / "fda_config.yml").read_text()


def test_fda_begins_where_task_arithmetic_with_them_ends(tiny, tmp_path: Path) -> None:
    """Coefficients that hardly move leave the start: elementwise alpha from filtered weights."""
    weight = [{"filter": "attention", "value": [1.0, 0.25]}, {"value": 0.5}]
    names = dict(zip(("movie", "news"), tiny.experts, strict=False))
    small = {"anchors": 4, "tokens": 3, "steps": 1, "epochs": 1, "adapt_lr": 1e-30}
    common = {"weight": weight, "device": "cpu", "progress": False}
    for preset in ("vit-b-32", None):  # one alpha per task vector, and on their sum
        extra = {"start": "task_arithmetic", "preset": preset, "outside": "start", **small}
        out = tmp_path / f"fda-{preset}"
        fda_fast.merge(tiny.base, names, out, **extra, **common)
        plain = tmp_path / f"plain-{preset}"
        fda_fast.merge(tiny.base, names, plain, method="task_arithmetic", **common)
        ours, theirs = (load_file(f / "model.safetensors") for f in (out, plain))
        for name, tensor in theirs.items():
            assert torch.allclose(ours[name], tensor, atol=1e-6), name
