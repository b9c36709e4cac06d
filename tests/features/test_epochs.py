"""Models after several numbers of epochs from one run: each that of a run of its own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fda_fast import estimate, merge
from fda_fast.budget import workload
from fda_fast.config import parse
from fda_fast.errors import InputError
from fda_fast.inspection import show
from fda_fast.job import prepare

SMALL: dict[str, Any] = {
    "anchors": 6,
    "tokens": 3,
    "steps": 5,
    "batch_size": 4,
    "device": "cpu",
    "progress": False,
}


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("start", ["pretrained", "task_arithmetic"])
def test_every_file_is_that_of_a_run_of_its_own(tiny, tmp_path: Path, start: str) -> None:
    many = tmp_path / "many"
    report = merge(tiny.base, tiny.experts, many, start=start, epochs=[4, 1, 2], **SMALL)
    assert sorted(path.name for path in many.iterdir()) == ["epochs-1", "epochs-2", "epochs-4"]
    contents = set()
    for epochs in (1, 2, 4):
        single = tmp_path / f"epochs-{epochs}"
        merge(tiny.base, tiny.experts, single, start=start, epochs=epochs, **SMALL)
        assert tree(single) == tree(many / single.name)
        for name in set(tree(single)) - {"fda_times.json"}:
            assert (single / name).read_bytes() == (many / single.name / name).read_bytes(), name
        contents.add((single / "model.safetensors").read_bytes())
    assert len(contents) == 3
    assert list(report.layers[0].snapshots) == [1, 2, 4]
    assert not (tmp_path / "many.fda-work").exists()


def test_models_load_and_anchors_are_kept_once(tiny, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    merge(tiny.base, tiny.experts, tmp_path / "out", epochs=[1, 2], keep_anchors=True, **SMALL)
    assert (tmp_path / "out" / "anchors" / "news" / "encoder.layer.0.safetensors").exists()
    for name in ("epochs-1", "epochs-2"):
        AutoModel.from_pretrained(tmp_path / "out" / name)
        AutoTokenizer.from_pretrained(tmp_path / "out" / name)
    console = Console(width=200, record=True, file=io.StringIO())
    show(tmp_path / "out", console)
    text = console.export_text()
    assert text.index("epochs-1") < text.index("epochs-2")


def test_a_run_that_died_while_writing_goes_on(tiny, tmp_path: Path, monkeypatch) -> None:
    from fda_fast import output

    merge(tiny.base, tiny.experts, tmp_path / "whole", epochs=[1, 2], **SMALL)
    write, count = output.write_model, []

    def dies(*args: Any, **keywords: Any) -> None:
        write(*args, **keywords)
        count.append(1)
        if len(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(output, "write_model", dies)
    with pytest.raises(KeyboardInterrupt):
        merge(tiny.base, tiny.experts, tmp_path / "out", epochs=[1, 2], **SMALL)
    assert not (tmp_path / "out").exists()
    merge(tiny.base, tiny.experts, tmp_path / "out", epochs=[1, 2], **SMALL)
    for name in tree(tmp_path / "whole"):
        if (tmp_path / "whole" / name).is_file() and not name.endswith("fda_times.json"):
            one, two = (tmp_path / folder / name for folder in ("whole", "out"))
            assert one.read_bytes() == two.read_bytes(), name


def test_what_configurations_may_say() -> None:
    def epochs(value: object) -> object:
        models = [{"model": "m"}]
        content = {"merge_method": "fda", "base_model": "b", "models": models}
        return parse({**content, "parameters": {"epochs": value}}).parameters.epochs

    assert epochs([100, 10, 10]) == (10, 100)
    assert epochs([7]) == epochs(7) == 7
    for wrong in ([], [0, 1], 0, True, "ten", 1.5):
        with pytest.raises(InputError, match=r"parameters\.epochs: a positive integer"):
            epochs(wrong)


def test_models_kept_meanwhile_count_as_memory(tiny) -> None:
    def memory(epochs: object) -> tuple[int, int]:
        models = [{"model": str(path)} for path in tiny.experts]
        content = {"merge_method": "fda", "base_model": str(tiny.base), "models": models}
        job = prepare(parse({**content, "parameters": {"epochs": epochs}}), "cpu")
        load = workload(job)
        job.close()
        layer = job.layers[0]
        found = estimate.layer_memory(layer, load)
        return estimate.adapt_bytes(layer, load) + found.saved, 4 * layer.numel

    one, copy = memory(3)
    three, _ = memory([1, 2, 3])
    assert three - one == 4 * copy  # two models, as they are adapted and as they are saved
