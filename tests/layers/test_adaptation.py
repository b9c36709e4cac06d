"""Adaptation programs against first-order autograd in float64."""

from __future__ import annotations

import pytest
import torch
from layer_stacks import STACKS, make_anchors, make_layers
from precisions import PRECISIONS

from fda_fast.layers.adaptation import ProgramAdaptation
from fda_fast.layers.autograd import AutogradAdaptation


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def both(stack, merged, distance, dtype=torch.float64, precision="fp32", ratio=0.1):
    layer, finetuned = make_layers(stack, tasks=2, ratio=ratio, dtype=dtype)
    anchors = make_anchors(2, 6, 3, 12, dtype=dtype)
    tasks = list(zip(anchors, finetuned, strict=True))
    ours = ProgramAdaptation(
        layer.program,
        layer,
        tasks,
        distance=distance,
        precision=PRECISIONS[precision],
        dtype=dtype,
        merged=merged,
    )
    theirs = AutogradAdaptation(layer, tasks, distance=distance)
    generator = torch.Generator().manual_seed(3)
    for name in theirs.parameter_names:
        noise = torch.randn(ours.deltas[name].shape, generator=generator, dtype=torch.float64)
        step = noise * (0.3 * ratio * dict(layer.named_parameters())[name].double().norm())
        step = (step / noise.norm()).detach().to(dtype)
        ours.deltas[name].copy_(step)
        theirs.deltas[name].copy_(step)
    ours.refresh()
    return ours, theirs


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("stack", list(STACKS))
def test_equals_autograd(stack, merged, distance):
    ours, theirs = both(stack, merged, distance)
    assert ours.size == theirs.size == 12
    assert ours.parameter_names == theirs.parameter_names
    index = torch.tensor([0, 7, 11, 3, 4])
    assert relative(ours.evaluate(index), theirs.evaluate(index)) < 1e-10
    for name, gradient in theirs.gradients.items():
        assert relative(ours.gradients[name], gradient) < 1e-10, name


@pytest.mark.parametrize(
    "precision, bound", [("tf32", 5e-3), ("bf16", 3e-2), ("bf16 native", 3e-2)]
)
@pytest.mark.parametrize("ratio", [1e-2, 1e-4])
def test_delta_form_survives_rounding(precision, bound, ratio):
    rounded, _ = both("pre_norm", None, "l2", torch.float32, precision, ratio)
    _, exact = both("pre_norm", None, "l2", torch.float64, ratio=ratio)
    index = torch.arange(12)
    rounded.evaluate(index)
    exact.evaluate(index)
    ours = torch.cat([g.flatten().double() for g in rounded.gradients.values()])
    theirs = torch.cat([g.flatten() for g in exact.gradients.values()])
    assert relative(ours, theirs) < bound


def test_refresh_takes_over_what_the_optimiser_wrote():
    ours, theirs = both("mlp", True, "cosine")
    index = torch.arange(12)
    for problem in (ours, theirs):
        for delta in problem.deltas.values():
            delta.add_(0.01)
        problem.refresh()
    assert relative(ours.evaluate(index), theirs.evaluate(index)) < 1e-10
