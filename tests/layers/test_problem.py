"""Programs against double backward in float64, where both must agree to the last digits."""

from __future__ import annotations

import pytest
import torch
from layer_stacks import ACTIVATIONS, STACKS, make_anchors, make_layers

from fda_fast.layers.autograd import AutogradProblem
from fda_fast.layers.folded import NormLinear
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision
from fda_fast.layers.problem import ProgramProblem

TOLERANCE = 1e-10


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def program_problem(layer, finetuned, tokens, precision="fp32", distance="cosine", form="auto"):
    dtype = next(layer.parameters()).dtype
    materials = Materials(
        layer, finetuned, tokens=tokens, precision=Precision(precision), dtype=dtype
    )
    return ProgramProblem(layer.program(materials, form=form), materials, distance=distance)


def assert_same(problem, oracle, anchors, tolerance=TOLERANCE):
    ours, theirs = problem.evaluate(anchors), oracle.evaluate(anchors)
    assert relative(ours.loss, theirs.loss) < tolerance
    assert relative(ours.cosines, theirs.cosines) < tolerance
    assert relative(ours.grad, theirs.grad) < tolerance


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize("kind", list(STACKS))
def test_equals_double_backward(kind, distance, form):
    layer, finetuned = make_layers(kind, tasks=3, ratio=0.1)
    anchors = make_anchors(3, 5, 4, 12)
    problem = program_problem(layer, finetuned, 4, distance=distance, form=form)
    assert_same(problem, AutogradProblem(layer, finetuned, distance=distance), anchors)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", ["swiglu", "mlp"])
def test_every_activation(kind, activation):
    layer, finetuned = make_layers(kind, tasks=2, ratio=0.03, kind=activation)
    anchors = make_anchors(2, 6, 1, 12)
    problem = program_problem(layer, finetuned, 1)
    assert_same(problem, AutogradProblem(layer, finetuned), anchors)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
def test_first_norm_folded_or_not(distance, fold):
    layer, finetuned = make_layers("pre_norm", tasks=3, ratio=0.1)
    materials = Materials(
        layer, finetuned, tokens=4, precision=Precision("fp32"), dtype=torch.float64
    )
    root = layer.program(materials)
    problem = ProgramProblem(root, materials, distance=distance, fold=fold)
    assert isinstance(next(root.leaves()), NormLinear) == fold
    oracle = AutogradProblem(layer, finetuned, distance=distance)
    assert_same(problem, oracle, make_anchors(3, 5, 4, 12))
