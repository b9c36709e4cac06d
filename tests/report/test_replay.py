"""Construction repeated from a run's record gives the run's own anchors, and those on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fda_fast
from fda_fast.curve import Curve
from fda_fast.errors import InputError
from fda_fast.layerwork import first_anchors
from fda_fast.pipeline import read_layer
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
    tasks = list(job.experts)
    found = replay(inputs, job.settings, tasks, {task: [0, 3, 8] for task in tasks})
    for task in tasks:
        saved = opened.saved_anchors(task, inputs.name)
        assert saved is not None
        # To the last bits, which the size of the batch may change.
        torch.testing.assert_close(found[task][8], saved.tensor)
        first = first_anchors(inputs, task, job.settings)
        assert torch.equal(found[task][0], first)
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
        torch.testing.assert_close(found[task][3], short.anchors)
    job.close()


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
    with pytest.raises(InputError, match=r"no fda_report\.json"):
        Run.open(tmp_path)
    (tmp_path / "fda_report.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Run.open(tmp_path)
    with pytest.raises(InputError, match="experts: expected movie, news, lora, got movie"):
        Run.open(run).job(tiny.base, {"movie": tiny.experts[0]}, "cpu")
