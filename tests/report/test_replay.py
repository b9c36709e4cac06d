"""Construction repeated from a run's record gives the run's own anchors, and those on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import fda_fast
from fda_fast.curve import Curve
from fda_fast.errors import InputError
from fda_fast.layerwork import first_anchors
from fda_fast.machine import here
from fda_fast.pipeline import read_layer
from fda_fast.report.analyses import analyse
from fda_fast.report.page import page
from fda_fast.report.replay import milestones, replay
from fda_fast.report.run import Run


def test_milestones() -> None:
    assert milestones(1200) == [0, 12, 36, 120, 360, 1200]
    assert milestones(3) == [0, 1, 3]
    assert milestones(1) == [0, 1]


def test_the_same_anchors_at_every_step(tiny, run: Path) -> None:
    opened = Run.open(run)
    job = opened.job(tiny.base, {path.name: path for path in tiny.experts}, "cpu")
    assert json.loads(json.dumps(job.settings.as_dict())) == opened.settings
    inputs = read_layer(job, 1)
    for task in job.experts:
        saved = opened.saved_anchors(task, inputs.name)
        assert saved is not None
        machine = saved.settings["machine"]
        assert machine == here(job.device) and "batch" not in saved.settings
        steps = {task: [0, 3, 8]}
        found = replay(inputs, job.settings, [task], steps, machine=machine)[task]
        assert torch.equal(found[8], saved.tensor)  # bit for bit
        first = first_anchors(inputs, task, job.settings)
        assert torch.equal(found[0], first)
        made = job.settings.construct
        short = fda_fast.construct(
            inputs.pretrained,
            inputs.finetuned[task],
            first,
            steps=3,
            lr=made.lr,
            weight_decay=made.weight_decay,
            distance=made.distance,
            progress=False,
        )
        assert torch.equal(found[3], short.anchors)
    job.close()


@pytest.mark.parametrize("wanted", [1, 2])
def test_as_many_threads_as_the_merge_had(tiny, tmp_path: Path, wanted: int) -> None:
    """The page looks at a layer on the threads of the merge, whatever this process has."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    if wanted > max(cores, before):
        pytest.skip(f"there are {cores} cores")
    experts = {path.name: path for path in tiny.experts}
    small = {"anchors": 6, "tokens": 3, "steps": 8, "epochs": 1, "progress": False}
    try:
        torch.set_num_threads(wanted)
        fda_fast.merge(tiny.base, experts, tmp_path / "out", keep_anchors=True, **small)
        torch.set_num_threads(3 - wanted)
        opened = Run.open(tmp_path / "out")
        job = opened.job(tiny.base, experts, "cpu")
        (layer,) = analyse(opened, job, indices=[0]).layers
        assert torch.get_num_threads() == 3 - wanted
        job.close()
    finally:
        torch.set_num_threads(before)
    assert opened.times.machine["threads"] == wanted
    assert [task.drift for task in layer.tasks.values()] == [0.0] * 3
    assert not any(task.elsewhere for task in layer.tasks.values())


def test_a_machine_that_cannot_repeat_is_named(tiny, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    opened = Run.open(tmp_path / "other")
    name = opened.layers[1].layer
    for task in opened.tasks:
        saved = opened.saved_anchors(task, name)
        assert saved is not None
        machine = saved.settings["machine"] | {"device": "an abacus", "threads": 100_000}
        moved = dataclasses.replace(
            saved, tensor=saved.tensor * (1 + 1e-6), settings=saved.settings | {"machine": machine}
        )
        moved.save(tmp_path / "other" / "anchors" / task / f"{name}.safetensors")
    job = opened.job(tiny.base, {path.name: path for path in tiny.experts}, "cpu")
    found = analyse(opened, job, indices=[1])
    job.close()
    for task in found.layers[0].tasks.values():
        assert task.drift == pytest.approx(1e-6, rel=0.5)
        threads, device = sorted(task.elsewhere, key=len)
        assert threads == f"threads 100000, here {torch.get_num_threads()}"
        assert device.startswith("device an abacus, here ")
    text = page(opened, found)
    assert "it ends within 1e-06 of the anchors kept" in text and "device an abacus, here" in text


def test_the_record_holds_the_curves(run: Path) -> None:
    opened = Run.open(run)
    assert opened.tasks == ["movie", "news", "lora"]
    for layer in opened.layers:
        assert len(layer.epochs) == 5
        assert layer.adaptation == pytest.approx((layer.epochs[0], layer.epochs[-1]), rel=1e-5)
        for task, result in layer.tasks.items():
            assert isinstance(result.history, Curve) and len(result.history.steps) == 8
            assert min(result.history.losses) == pytest.approx(result.loss, rel=1e-5)
            saved = opened.saved_anchors(task, layer.layer)
            assert saved is not None and saved.history == result.history


def test_refusals(tiny, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no fda_report\.json"):
        Run.open(tmp_path)
    (tmp_path / "fda_report.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Run.open(tmp_path)
    with pytest.raises(InputError, match="experts: expected movie, news, lora, got movie"):
        Run.open(run).job(tiny.base, {"movie": tiny.experts[0]}, "cpu")
