"""Loss curves that are kept with anchors and in reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fda_fast.anchors import Anchors
from fda_fast.curve import Curve
from fda_fast.errors import InputError


@pytest.mark.parametrize("steps", [1, 2, 99, 100, 101, 1200])
def test_thinning_keeps_both_ends_and_true_values(steps: int) -> None:
    losses = [10 / (1 + i) for i in range(steps)]
    curve = Curve.of(losses)
    assert len(curve.steps) == len(curve.losses) == min(steps, 100)
    assert (curve.steps[0], curve.steps[-1]) == (1, steps)
    assert list(curve.steps) == sorted(set(curve.steps))
    for step, loss in zip(curve.steps, curve.losses, strict=True):
        assert loss == float(f"{losses[step - 1]:.6g}")


def test_curves_travel_with_anchors(tmp_path: Path) -> None:
    curve = Curve.of([3.0, 2.0, 1.25])
    Anchors(torch.zeros(2, 3), "layer", "task", history=curve).save(tmp_path / "with")
    Anchors(torch.zeros(2, 3), "layer", "task").save(tmp_path / "without")
    assert Anchors.load(tmp_path / "with").history == curve
    assert Anchors.load(tmp_path / "without").history is None
    assert Curve.from_record(json.loads(json.dumps(curve.as_record()))) == curve


def test_a_damaged_curve_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    Anchors(torch.zeros(2, 3), "layer", "task", history=Curve((1,), (2.0,))).save(path)
    path.write_bytes(path.read_bytes().replace(b'\\"steps\\"', b'\\"stops\\"'))
    with pytest.raises(InputError, match="damaged metadata"):
        Anchors.load(path)
