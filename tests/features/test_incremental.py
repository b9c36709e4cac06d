"""One expert more: only its anchors are constructed, the others' are taken as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fda_fast import merge
from fda_fast.cli import app
from fda_fast.errors import InputError

SMALL: dict[str, Any] = {
    "anchors": 6,
    "tokens": 3,
    "steps": 8,
    "epochs": 3,
    "device": "cpu",
    "progress": False,
}


def constructed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Every group of tasks that anchors are constructed for from here on."""
    from fda_fast import layerwork

    seen = []
    original = layerwork._construct_group

    def watched(inputs: Any, settings: Any, group: Any, *rest: Any) -> Any:
        seen.append(tuple(group))
        return original(inputs, settings, group, *rest)

    monkeypatch.setattr(layerwork, "_construct_group", watched)
    return seen


def test_adding_an_expert_constructs_its_anchors_only(tiny, tmp_path: Path, monkeypatch) -> None:
    two = merge(tiny.base, tiny.experts[:2], tmp_path / "two", keep_anchors=True, **SMALL)
    groups = constructed(monkeypatch)
    three = merge(
        tiny.base, tiny.experts, tmp_path / "three", anchors_from=two.output / "anchors",
        keep_anchors=True, **SMALL,
    )  # fmt: skip
    assert groups == [("lora",), ("lora",)]
    assert any("movie, news are taken" in n and "lora are constructed" in n for n in three.notes)
    for task in ("movie", "news"):
        for layer in ("encoder.layer.0", "encoder.layer.1"):
            name = f"anchors/{task}/{layer}.safetensors"
            assert (two.output / name).read_bytes() == (three.output / name).read_bytes()
    # On a CPU experts are constructed one by one, so a merge from scratch gives the same bytes; on
    # a GPU the size of a batch may change the last bits of a product.
    fresh = merge(tiny.base, tiny.experts, tmp_path / "fresh", keep_anchors=True, **SMALL)
    for path in fresh.output.rglob("*.safetensors"):
        assert path.read_bytes() == (three.output / path.relative_to(fresh.output)).read_bytes()


def test_anchors_of_other_weights_are_refused(tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.experts[:1], tmp_path / "one", keep_anchors=True, **SMALL)
    experts = {"movie": tiny.experts[1], "news": tiny.experts[2]}  # news under another's name
    with pytest.raises(InputError, match="made from other weights of expert movie"):
        merge(
            tiny.base, experts, tmp_path / "out", anchors_from=tmp_path / "one" / "anchors", **SMALL
        )
    assert not (tmp_path / "out").exists()


def test_other_settings_are_said(tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.experts[:1], tmp_path / "one", keep_anchors=True, **SMALL)
    report = merge(
        tiny.base, tiny.experts[:2], tmp_path / "two", anchors_from=tmp_path / "one" / "anchors",
        **{**SMALL, "steps": 9},
    )  # fmt: skip
    assert "the anchors of movie were constructed with steps 8 (now 9)" in report.notes


def test_a_folder_for_other_experts_is_refused(tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.experts[:1], tmp_path / "one", keep_anchors=True, **SMALL)
    with pytest.raises(InputError, match=r"none of these experts.*news.*movie"):
        merge(
            tiny.base,
            tiny.experts[1:2],
            tmp_path / "out",
            anchors_from=tmp_path / "one" / "anchors",
            **SMALL,
        )
    with pytest.raises(InputError, match="a folder that `construct` wrote"):
        merge(tiny.base, tiny.experts, tmp_path / "out", anchors_from=tmp_path / "no", **SMALL)


def test_command_line(tiny, tmp_path: Path) -> None:
    merge(tiny.base, tiny.experts[:1], tmp_path / "one", keep_anchors=True, **SMALL)
    config = str(tiny.config(tmp_path, epochs=1))
    anchors = str(tmp_path / "one" / "anchors")
    arguments = ["merge", config, str(tmp_path / "out"), "--anchors-from", anchors]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").exists()
    strict = ["adapt", config, anchors, str(tmp_path / "all"), "--device", "cpu", "-q"]
    result = CliRunner().invoke(app, strict)
    assert result.exit_code == 2
    assert "no anchors of expert news" in result.output
