"""The fidelity gate: dL/dX of every precision against float64 double backward, at every ratio.

``table()`` prints plain autograd in the same precisions beside it; run this file with ``-s``.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from layer_stacks import STACKS, make_anchors, make_layers
from precisions import GATE, PRECISIONS
from torch.utils._python_dispatch import TorchDispatchMode

from fda_fast.layers.autograd import AutogradProblem
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import round_bf16, round_tf32
from fda_fast.layers.problem import ProgramProblem

RATIOS = (1e-1, 1e-2, 1e-3, 1e-4)
TASKS, ANCHORS, TOKENS, WIDTH, HIDDEN = 1, 12, 4, 48, 96


class RoundedProducts(TorchDispatchMode):
    """What a GPU does to plain autograd: the operands of every matrix product are rounded."""

    def __init__(self, rounding):
        super().__init__()
        self.rounding = rounding

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        if first is not None:
            args = list(args)
            args[first : first + 2] = [self.rounding(a) for a in args[first : first + 2]]
        return func(*args, **(kwargs or {}))


ROUNDINGS = {"tf32": round_tf32, "bf16": round_bf16, "bf16 native": round_bf16}


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def errors(stack, ratio, seed=0):
    """{(engine, precision): relative error of dL/dX}, with the float32 layers as the truth."""
    sizes = {"d": WIDTH, "h": HIDDEN}
    layer, finetuned = make_layers(stack, TASKS, ratio, dtype=torch.float32, seed=seed, **sizes)
    anchors = make_anchors(TASKS, ANCHORS, TOKENS, WIDTH, dtype=torch.float32, seed=seed + 1)
    # float32 tensors are exact in float64, so the oracle has the very same task vectors.
    exact_layers = make_layers(stack, TASKS, ratio, dtype=torch.float32, seed=seed, **sizes)
    oracle = AutogradProblem(exact_layers[0].double(), [f.double() for f in exact_layers[1]])
    exact = oracle.evaluate(anchors.double())
    found = {}
    for precision, products in PRECISIONS.items():
        materials = Materials(
            layer, finetuned, tokens=TOKENS, precision=products, dtype=torch.float32
        )
        program = ProgramProblem(layer.program(materials), materials).evaluate(anchors)
        found["program", precision] = relative(program.grad, exact.grad)
        rounded = contextlib.nullcontext()
        if precision in ROUNDINGS:
            rounded = RoundedProducts(ROUNDINGS[precision])
        with rounded:
            plain = AutogradProblem(layer, finetuned).evaluate(anchors)
        found["autograd", precision] = relative(plain.grad, exact.grad)
    return found


def table(stacks=tuple(STACKS), ratios=RATIOS):
    """Relative errors of dL/dX, one line per stack and ratio; returns them as well."""
    columns = [(e, p) for p in ("fp32", "tf32", "bf16") for e in ("program", "autograd")]
    columns.append(("program", "bf16 native"))
    print("\n" + " " * 18 + "".join(f"{e + ' ' + p:>20}" for e, p in columns))
    rows = {}
    for stack in stacks:
        for ratio in ratios:
            rows[stack, ratio] = found = errors(stack, ratio)
            print(f"{stack:<11}{ratio:<7.0e}" + "".join(f"{found[c]:>20.1e}" for c in columns))
    return rows


@pytest.fixture(scope="module")
def rows():
    return table()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("stack", list(STACKS))
def test_rounded_products_keep_the_gradient(rows, stack, ratio):
    for precision, bound in GATE.items():
        assert rows[stack, ratio]["program", precision] <= bound, precision


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("stack", list(STACKS))
def test_fp32_is_never_worse_than_double_backward(rows, stack, ratio):
    found = rows[stack, ratio]
    assert found["program", "fp32"] <= found["autograd", "fp32"]


@pytest.mark.parametrize("stack", list(STACKS))
def test_gram_form_keeps_the_gradient_as_well(stack):
    layer, finetuned = make_layers(stack, TASKS, 1e-3, dtype=torch.float32, d=WIDTH, h=HIDDEN)
    wide = make_layers(stack, TASKS, 1e-3, dtype=torch.float32, d=WIDTH, h=HIDDEN)
    anchors = make_anchors(TASKS, ANCHORS, TOKENS, WIDTH, dtype=torch.float32)
    oracle = AutogradProblem(wide[0].double(), [f.double() for f in wide[1]])
    exact = oracle.evaluate(anchors.double())
    for precision, bound in GATE.items():
        materials = Materials(layer, finetuned, tokens=TOKENS, precision=PRECISIONS[precision])
        problem = ProgramProblem(layer.program(materials, form="gram"), materials)
        assert relative(problem.evaluate(anchors).grad, exact.grad) <= bound, precision


def test_plain_autograd_does_not_survive_rounding(rows):
    """Otherwise the gate would show nothing."""
    for stack in STACKS:
        assert rows[stack, 1e-4]["autograd", "bf16"] > 0.5
        assert rows[stack, 1e-4]["autograd", "tf32"] > 0.1


def optimise(problem, anchors, steps, truth):
    """The float64 loss of the anchors that AdamW's best evaluated loss picks."""
    x = anchors.clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=1e-2)
    best, best_x = torch.inf, None
    for _ in range(steps):
        result = problem.evaluate(x.detach())
        if result.loss.item() < best:
            best, best_x = result.loss.item(), x.detach().clone()
        x.grad = result.grad
        optimizer.step()
    return truth.evaluate(best_x.double()).loss.item()


@pytest.mark.parametrize("stack", ["swiglu", "post_norm"])
def test_150_steps_end_where_float64_ends(stack):
    layer, finetuned = make_layers(stack, 1, 1e-3, dtype=torch.float32, d=24, h=40)
    anchors = make_anchors(1, 12, 2, 24, dtype=torch.float32)
    wide = make_layers(stack, 1, 1e-3, dtype=torch.float32, d=24, h=40)
    wide_layer, wide_finetuned = wide[0].double(), [f.double() for f in wide[1]]
    truth = AutogradProblem(wide_layer, wide_finetuned)

    def program(precision, layer, finetuned, dtype):
        materials = Materials(
            layer, finetuned, tokens=2, precision=PRECISIONS[precision], dtype=dtype
        )
        return ProgramProblem(layer.program(materials), materials)

    exact = program("fp32", wide_layer, wide_finetuned, torch.float64)
    reference = optimise(exact, anchors.double(), 150, truth)
    start = truth.evaluate(anchors.double()).loss.item()
    assert reference < 0.8 * start
    for precision in PRECISIONS:
        problem = program(precision, layer, finetuned, torch.float32)
        reached = optimise(problem, anchors, 150, truth)
        assert abs(reached - reference) <= 0.01 * reference, precision
