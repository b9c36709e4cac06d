"""Task vectors as values: over modules, state dicts and paths."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fda_fast
from fda_fast import TaskVector
from fda_fast.errors import InputError


def dicts() -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(0)

    def make() -> dict[str, torch.Tensor]:
        return {
            "a.weight": torch.randn(3, 4, generator=generator),
            "b.bias": torch.randn(5, generator=generator).bfloat16(),
            "ids": torch.arange(3),
        }

    return make(), make(), make()


def test_arithmetic_of_state_dicts() -> None:
    base, one, two = dicts()
    first, second = TaskVector(base, one), TaskVector(base, two)
    assert list(first.vector) == ["a.weight", "b.bias"]
    assert first.vector["b.bias"].dtype == torch.float32
    name = "a.weight"
    a, b = one[name] - base[name], two[name] - base[name]
    for vector, expected in {
        first + second: a + b,
        first - second: a - b,
        -first: -a,
        0.5 * first: 0.5 * a,
        first * 2 / 4: 2 * a * 0.25,
        sum([first, second]): a + b,
    }.items():
        assert isinstance(vector, TaskVector)
        assert torch.equal(vector.vector[name], expected)
    merged = (first + second).apply_to(base, scaling_coef=0.3)
    assert torch.equal(merged[name], torch.add(base[name], a + b, alpha=0.3))
    assert merged["b.bias"].dtype == torch.bfloat16 and torch.equal(merged["ids"], base["ids"])
    assert merged[name].data_ptr() != base[name].data_ptr()


def test_is_the_start_of_a_merge(tiny, tmp_path: Path) -> None:
    """The sum of vectors and Task Arithmetic agree to one rounding of float32 sums."""
    vectors = [TaskVector(tiny.base, expert) for expert in tiny.experts]
    merged = sum(vectors).apply_to(tiny.base, 0.3)  # type: ignore[union-attr]
    fda_fast.merge(
        tiny.base, tiny.experts, tmp_path / "out", method="task_arithmetic", progress=False
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == written.keys()
    for name, tensor in written.items():
        ulps = torch.finfo(torch.float32).eps * tensor.abs().max() * 2
        assert (merged[name] - tensor).abs().max() <= ulps, name


def test_modules_and_paths_agree(tiny) -> None:
    from peft import PeftModel
    from transformers import BertForSequenceClassification, BertModel

    pretrained = BertModel.from_pretrained(tiny.base)
    movie = BertModel.from_pretrained(tiny.experts[0])
    of_paths = TaskVector(tiny.base, tiny.experts[0])
    of_modules = TaskVector(pretrained, movie)
    assert of_paths.vector.keys() == of_modules.vector.keys()
    assert all(torch.equal(of_paths.vector[n], v) for n, v in of_modules.vector.items())
    applied: Any = of_modules.apply_to(pretrained)
    assert type(applied) is BertModel and applied is not pretrained
    weight = "encoder.layer.1.output.dense.weight"
    assert torch.allclose(applied.state_dict()[weight], movie.state_dict()[weight], atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        lora = PeftModel.from_pretrained(BertModel.from_pretrained(tiny.base), tiny.experts[2])
    merged_copy = TaskVector(pretrained, lora).vector
    exact = TaskVector(tiny.base, tiny.experts[2]).vector
    assert all(torch.allclose(merged_copy[n], exact[n], atol=1e-6) for n in exact)
    headed = BertForSequenceClassification(pretrained.config)
    with pytest.raises(InputError, match="tensors of the same names"):
        TaskVector(pretrained, headed)


def test_paths_are_read_when_asked_for(tmp_path: Path) -> None:
    base, one, two = dicts()
    for name, tensors in {"base": base, "one": one, "two": two}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    vector = TaskVector(tmp_path / "base.safetensors", tmp_path / "one.safetensors")
    total = vector + TaskVector(base, two)
    assert len(total.vector) == 2 and "a.weight" in total.vector
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(InputError, match=r"one\.safetensors"):
        total.vector["a.weight"]
    with pytest.raises(KeyError):
        total.vector["nothing"]


def test_refusals() -> None:
    base, one, _ = dicts()
    with pytest.raises(InputError, match="neither or both"):
        TaskVector(base)
    with pytest.raises(InputError, match=r"tensor 'a\.weight'"):
        TaskVector(base, {**one, "a.weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match="apply_to"):
        TaskVector(base, one).apply_to({"other": torch.zeros(2)})
    with pytest.raises(TypeError):
        TaskVector(base, one) + 3
