"""A plan finds what is wrong before any work, and its numbers follow from shapes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fda_fast.checkpoints.layout import LayerSpec
from fda_fast.checkpoints.plan import Plan, measure_gflops
from fda_fast.checkpoints.tensorfile import TensorFile
from fda_fast.errors import InputError

from .conftest import finetune

Family = Callable[[str], Path]
Make = Callable[..., Path]


def shape(spec: LayerSpec) -> tuple[int, ...]:
    return (8, 5, spec.width) if spec.scope == "block" else (64, spec.width)


def plan(base: Path, experts: dict[str, Path], output: Path | None, **options: Any) -> Plan:
    return Plan.open(
        base, experts, output, **{"shape": shape, "steps": 100, "gflops": 50.0, **options}
    )


def test_numbers_of_a_block(family: Family, expert: Make, tmp_path: Path) -> None:
    experts = {n: expert(family("bert"), name=n) for n in ("a", "b")}
    made = plan(family("bert"), experts, tmp_path / "out", epochs=10)
    assert [row.layer for row in made.rows] == [f"encoder.layer.{i}" for i in range(3)]
    row = made.rows[0]
    assert (row.kind, row.anchors) == ("BertLayer", (8, 5, 16))
    weights = 4 * 16 * 16 + 2 * 16 * 24
    assert row.parameters == weights + 4 * 16 + 24 + 16 + 4 * 16
    products = 8.5 * 2 * 40 * weights + 24 * 2 * 40 * 5 * 16
    assert row.gflop_per_step == pytest.approx(2 * products / 1e9, rel=1e-12)
    assert made.memory_bytes == row.memory_bytes > 4 * row.parameters * 12
    output = 4 * sum(info.numel for info in made.base.names.values())
    assert made.disk_bytes == output + 3 * 4 * (row.parameters + 2 * 8 * 5 * 16)
    assert made.seconds == sum(r.seconds for r in made.rows) > 0
    assert [view.role for view in made.experts] == ["expert a", "expert b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_more_of_everything_takes_more(family: Family, expert: Make) -> None:
    base, one = family("llama"), expert(family("llama"))
    small = plan(base, {"a": one}, None)
    assert plan(base, {"a": one}, None, steps=200).seconds == pytest.approx(2 * small.seconds)
    two = plan(base, {"a": one, "b": one}, None)
    assert two.rows[0].gflop_per_step == pytest.approx(2 * small.rows[0].gflop_per_step)
    assert two.memory_bytes > small.memory_bytes
    halves = plan(base, {"a": one}, None, dtype=torch.bfloat16)
    stored = sum(info.numel for info in small.base.names.values())
    assert small.disk_bytes - halves.disk_bytes == 2 * stored


def test_reads_headers_and_a_few_small_tensors(
    family: Family, expert: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = TensorFile.read

    def counting(self: TensorFile, infos: Any) -> list[torch.Tensor]:
        tensors = original(self, infos)
        read.append(sum(t.nbytes for t in tensors))
        return tensors

    monkeypatch.setattr(TensorFile, "read", counting)
    made = plan(family("bert"), {"a": expert(family("bert"))}, None)
    assert 0 < sum(read) < made.base.nbytes / 20


def test_bad_inputs_are_found_and_nothing_is_written(
    family: Family, expert: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family("bert")
    good = expert(base, name="good")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    with pytest.raises(InputError, match="new or empty"):
        plan(base, {"a": good}, tmp_path / "full")
    with pytest.raises(InputError, match=r"identical.*in every layer"):
        plan(base, {"a": good, "copy": base}, out)
    with pytest.raises(InputError, match="expert llama"):
        plan(base, {"a": good, "llama": family("llama")}, out)
    with pytest.raises(InputError, match="expert gone"):
        plan(base, {"gone": tmp_path / "nowhere"}, out)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="too small"):
        plan(base, {"a": good}, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_notes_gather_everything_said(family: Family, expert: Make) -> None:
    def headed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return finetune(tensors) | {"classifier.weight": torch.ones(2, 16)}

    made = plan(family("bert"), {"a": expert(family("bert"), headed)}, None)
    assert any("classifier.weight" in note for note in made.notes)


def test_speed_is_measured() -> None:
    assert 0.1 < measure_gflops(seconds=0.03) < 1e5
