"""Programs against double backward in float64, where both must agree to the last digits."""

from __future__ import annotations

import pytest
import torch
from layer_stacks import ACTIVATIONS, STACKS, make_anchors, make_layers
from precisions import PRECISIONS
from torch.utils._python_dispatch import TorchDispatchMode

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


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a device, or copy from it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["bf16", "bf16 native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", list(STACKS))
def test_nothing_waits_for_the_device_and_nothing_is_kept(kind, dtype, precision):
    layer, finetuned = make_layers(kind, tasks=2, ratio=0.1, dtype=dtype)
    anchors = make_anchors(2, 7, 4, 12, dtype=dtype)
    materials = Materials(layer, finetuned, tokens=4, precision=PRECISIONS[precision], dtype=dtype)
    root = layer.program(materials)
    problem = ProgramProblem(root, materials)
    problem.evaluate(anchors)
    with HostReads() as reads:
        result = problem.evaluate(anchors.clone().requires_grad_())
    assert not reads.found
    assert not result.loss.requires_grad and not result.grad.requires_grad
    kept = {
        name
        for leaf in root.leaves()
        for name, value in vars(leaf).items()
        if isinstance(value, torch.Tensor) and value.shape[:2] == (2, 28)
    }
    assert not kept


def test_layers_of_low_precision_get_task_vectors_formed_in_float32():
    layer, finetuned = make_layers("mlp", tasks=2, ratio=1e-2, dtype=torch.bfloat16)
    anchors = make_anchors(2, 5, 4, 12, dtype=torch.float32)
    problem = ProgramProblem(
        layer.program(m := Materials(layer, finetuned, tokens=4, precision=Precision("fp32"))), m
    )
    wide = AutogradProblem(layer.double(), [f.double() for f in finetuned])
    ours, theirs = problem.evaluate(anchors), wide.evaluate(anchors.double())
    assert relative(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("kind", ["pre_norm", "post_norm"])
def test_tensors_without_a_task_vector_are_the_constant_one(kind):
    layer, finetuned = make_layers(kind, tasks=2, ratio=0.1)
    with torch.no_grad():
        for tuned in finetuned[:1]:
            for name, p in tuned.named_parameters():
                if "mlp1" in name or "norm2" in name:
                    p.copy_(dict(layer.named_parameters())[name])
    anchors = make_anchors(2, 5, 4, 12)
    problem = program_problem(layer, finetuned, 4)
    assert_same(problem, AutogradProblem(layer, finetuned), anchors)
    assert problem.evaluate(anchors).cosines[0].eq(0).any()


def test_a_task_equal_to_the_pretrained_layer_has_a_constant_loss():
    layer, finetuned = make_layers("swiglu", tasks=1, ratio=0.0)
    result = program_problem(layer, finetuned, 4).evaluate(make_anchors(1, 5, 4, 12))
    assert result.loss.item() == 3
    assert not result.grad.any()
