"""Reading, computing and saving at once: in order, in bounded memory, each byte once."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fda_fast import merge
from fda_fast.budget import Limits
from fda_fast.checkpoints.tensorfile import TensorFile
from fda_fast.errors import InputError
from fda_fast.stream import overlapped
from fda_fast.upload import Uploader

SMALL: dict[str, Any] = {"anchors": 6, "tokens": 3, "steps": 8, "epochs": 5, "device": "cpu"}


class Thing:
    """Something whose life can be watched."""

    living: ClassVar[weakref.WeakSet[Thing]] = weakref.WeakSet()

    def __init__(self, number: int) -> None:
        self.number = number
        Thing.living.add(self)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_item_passes_once_and_in_order(count: int, overlap: bool) -> None:
    read, worked, saved = [], [], []
    threads: dict[str, set[int]] = defaultdict(set)

    def note(stage: str, done: list[int], number: int) -> int:
        threads[stage].add(threading.get_ident())
        done.append(number)
        return number

    overlapped(
        range(count),
        lambda i: 10 * note("read", read, i),
        lambda i, x: x + note("work", worked, i),
        lambda i, x: saved.append((note("save", [], i), x)),
        overlap=overlap,
    )
    assert read == worked == list(range(count))
    assert saved == [(i, 11 * i) for i in range(count)]
    if count:
        assert threads["work"] == {threading.get_ident()}
        assert (threads["read"] != threads["work"]) == overlap


def test_the_next_is_read_and_the_last_saved_meanwhile() -> None:
    """Item 1 is being read, and then item 0 saved, while the other is worked on."""
    reading, saving = threading.Event(), threading.Event()

    def read(item: int) -> int:
        if item == 1:
            reading.set()
        return item

    def work(item: int, given: int) -> int:
        # Would wait for ever if one thing were done after the other.
        assert reading.wait(30) if item == 0 else saving.wait(30)
        return given

    overlapped([0, 1], read, work, lambda item, made: saving.set())


def test_two_inputs_and_two_outputs_live_at_most() -> None:
    most = 0

    def watch() -> None:
        nonlocal most
        gc.collect()
        most = max(most, len(Thing.living))

    def read(item: int) -> Thing:
        made = Thing(item)
        watch()
        return made

    def work(item: int, given: Thing) -> Thing:
        watch()
        return Thing(item)

    overlapped(range(12), read, work, lambda item, made: watch())
    assert 2 <= most <= 4
    gc.collect()
    assert not Thing.living


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", ["read", "work", "save"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_errors_surface_and_finished_work_is_saved(
    stage: str, overlap: bool, error: BaseException
) -> None:
    saved = []

    def failing(at: str, item: int) -> int:
        if at == stage and item == 2:
            raise error
        return item

    with pytest.raises(type(error)):
        overlapped(
            range(6),
            lambda i: failing("read", i),
            lambda i, x: failing("work", i),
            lambda i, x: saved.append(failing("save", i)),
            overlap=overlap,
        )
    assert saved == [0, 1]
    assert not [t for t in threading.enumerate() if t.name.startswith(("read_", "save_"))]


def test_waiting_is_measured() -> None:
    def slow(item: int) -> int:
        time.sleep(0.02)
        return item

    hidden = overlapped(range(5), lambda i: i, lambda i, x: slow(i), lambda i, x: None)
    shown = overlapped(range(5), slow, lambda i, x: x, lambda i, x: None)
    assert hidden < 0.02 < 0.05 < shown


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in found
        if path.name != "fda_times.json"
    }


@pytest.mark.parametrize("method", ["fda", "tsv"])
def test_without_overlap_the_same_files(tiny, tmp_path: Path, monkeypatch, method: str) -> None:
    merge(tiny.base, tiny.experts, tmp_path / "a", method=method, progress=False, **SMALL)
    monkeypatch.setattr("fda_fast.budget.choose_limits", lambda *_: Limits(1, False, 0))
    merge(tiny.base, tiny.experts, tmp_path / "b", method=method, progress=False, **SMALL)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("settings", "experts"),
    [({}, False), ({"outside": "start", "start": "tsv"}, True), ({"method": "wudi"}, True)],
)
def test_every_byte_is_read_once(tiny, tmp_path: Path, monkeypatch, settings, experts) -> None:
    """Not counting the first values of the last layer, which tell an expert from the base."""
    read: dict[Path, int] = defaultdict(int)
    original = TensorFile._read_one

    def counting(self: TensorFile, stream: Any, info: Any) -> torch.Tensor:
        read[self.path] += info.nbytes
        return original(self, stream, info)

    monkeypatch.setattr("fda_fast.checkpoints.identity.check_differs", lambda view, layout: None)
    monkeypatch.setattr(TensorFile, "_read_one", counting)
    merge(tiny.base, tiny.experts[:2], tmp_path / "out", progress=False, **SMALL, **settings)
    from safetensors import safe_open

    for folder in (tiny.base, *tiny.experts[:2]):
        path = folder / "model.safetensors"
        with safe_open(path, "pt") as file:
            stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        if folder == tiny.base or experts:
            assert read[path] == stored, folder
        else:
            assert 0 < read[path] < stored


def test_telling_an_expert_from_the_base_reads_little(tiny, tmp_path: Path, monkeypatch) -> None:
    from fda_fast.checkpoints.align import match_expert
    from fda_fast.checkpoints.identity import check_differs
    from fda_fast.checkpoints.layout import ModelLayout
    from fda_fast.checkpoints.reader import Checkpoint

    base = Checkpoint.open(tiny.base)
    layout = ModelLayout.from_checkpoint(base)
    view = match_expert(base, Checkpoint.open(tiny.experts[0], "expert movie"), layout)
    read = []
    original = TensorFile.read

    def counting(self: TensorFile, infos: Any) -> list[torch.Tensor]:
        tensors = original(self, infos)
        read.append(sum(tensor.nbytes for tensor in tensors))
        return tensors

    monkeypatch.setattr(TensorFile, "read", counting)
    check_differs(view, layout)
    assert 0 < sum(read) <= 2 * 4096 * 4
    copy = match_expert(base, Checkpoint.open(tiny.base, "expert copy"), layout)
    with pytest.raises(InputError, match="identical to the base model in every layer"):
        check_differs(copy, layout)


def test_an_input_that_changes_meanwhile_is_an_error(tiny, tmp_path: Path, monkeypatch) -> None:
    """In the reading thread, while the layer before is being worked on."""
    from fda_fast import pipeline

    expert = tiny.copy("movie", tmp_path / "movie")
    original = pipeline._optimise

    def cutting(*args: Any) -> Any:
        with open(expert / "model.safetensors", "r+b") as file:
            file.truncate(1000)
        return original(*args)

    read = pipeline.read_layer

    def late(job: Any, index: int, **keywords: Any) -> Any:
        if index == 1:
            while (expert / "model.safetensors").stat().st_size > 1000:
                time.sleep(0.01)
        return read(job, index, **keywords)

    monkeypatch.setattr(pipeline, "_optimise", cutting)
    monkeypatch.setattr(pipeline, "read_layer", late)
    with pytest.raises(InputError, match="changed while it was being used"):
        merge(tiny.base, [expert, tiny.experts[1]], tmp_path / "out", progress=False, **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_plain_start_says_which_layer(tiny, tmp_path: Path, capfd) -> None:
    merge(tiny.base, tiny.experts[:2], tmp_path / "out", method="tsv", device="cpu")
    said = capfd.readouterr().err
    assert "layer 1/2 encoder.layer.0 | done" in said
    assert "layer 2/2 encoder.layer.1 | done" in said


def test_uploading_to_the_cpu_changes_nothing() -> None:
    layer = nn.Linear(3, 2)
    uploader = Uploader(torch.device("cpu"))
    assert uploader.upload(layer) is layer
    uploader.take_over(layer)
