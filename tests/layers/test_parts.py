"""Anchors in parts: the same numbers as all at once, for every layer, engine and precision."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import BLOCKS, in_float64, make_anchors, make_blocks
from layer_stacks import STACKS, make_layers
from precisions import GATE, PRECISIONS
from test_problem import HostReads

from fda_fast import layers
from fda_fast.errors import InputError
from fda_fast.layers.adaptation import ProgramAdaptation
from fda_fast.layers.autograd import AutogradAdaptation, AutogradProblem
from fda_fast.layers.factored import attach_factors
from fda_fast.layers.objective import Objective
from fda_fast.layers.parameter import Materials
from fda_fast.layers.problem import ProgramProblem
from fda_fast.layers.recognise import recognise

TOKENS, ANCHORS = 6, 5
# 5 anchors: one by one, with a rest, as 3 + 2.
PARTS = (1, 2, 3)


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def program(layer, finetuned, precision="fp32", tokens=TOKENS, build=None, **options):
    dtype = next(layer.parameters()).dtype
    materials = Materials(
        layer, finetuned, tokens=tokens, precision=PRECISIONS[precision], dtype=dtype
    )
    build = build or recognise(layer).build
    return ProgramProblem(build(materials), materials, **options)


def assert_same(found, expected, tolerance=1e-10):
    for what in ("loss", "cosines", "grad"):
        assert relative(getattr(found, what), getattr(expected, what)) < tolerance, what


@pytest.mark.parametrize("name", BLOCKS)
def test_every_layer_in_float64(name):
    layer, finetuned = make_blocks(name, 2, 0.1)
    anchors = make_anchors(2, ANCHORS, TOKENS)
    expected = AutogradProblem(layer, finetuned).evaluate(anchors)
    recipe = recognise(make_blocks(name, 1, 0.1, torch.float32)[0])
    for part in PARTS:
        split = program(layer, finetuned, part=part, build=recipe.build)
        assert_same(split.evaluate(anchors), expected)
        assert_same(split.evaluate(anchors), expected)  # nothing of the first is left


@pytest.mark.parametrize("form", ["auto", "gram"])
@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize("kind", list(STACKS))
def test_every_distance_on_both_engines(kind, distance, form):
    layer, finetuned = make_layers(kind, tasks=3, ratio=0.1)
    anchors = make_anchors(3, 7, 4, width=12)
    expected = AutogradProblem(layer, finetuned, distance=distance).evaluate(anchors)

    def build(materials):
        return layer.program(materials, form=form)

    for part in (1, 3, 4):
        split = program(layer, finetuned, tokens=4, build=build, distance=distance, part=part)
        assert_same(split.evaluate(anchors), expected)
    autograd = AutogradProblem(layer, finetuned, distance=distance, part=3)
    assert_same(autograd.evaluate(anchors), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_rounded_products_keep_the_gradient(name):
    """The fidelity gate, and no more error than twice that of all anchors at once."""
    layer, finetuned = make_blocks(name, 2, 1e-3, torch.float32, width=64)
    anchors = make_anchors(2, 4, TOKENS, torch.float32, width=64)
    oracle = AutogradProblem(in_float64(layer), [in_float64(one) for one in finetuned])
    gold = oracle.evaluate(anchors.double()).grad
    plain = relative(AutogradProblem(layer, finetuned).evaluate(anchors).grad, gold)
    for precision in PRECISIONS:
        whole = program(layer, finetuned, precision).evaluate(anchors).grad
        split = program(layer, finetuned, precision, part=3).evaluate(anchors).grad
        error = relative(split, gold)
        assert error <= GATE.get(precision, plain)
        assert error <= 2 * relative(whole, gold)


def test_the_operands_are_rounded_in_parts_as_well():
    """Otherwise the gate above would show nothing of tf32 and bf16."""
    layer, finetuned = make_blocks("open_clip", 1, 1e-2, torch.float32)
    anchors = make_anchors(1, 4, TOKENS, torch.float32)
    exact = program(layer, finetuned, part=2).evaluate(anchors).grad
    for precision in GATE:
        rounded = program(layer, finetuned, precision, part=2).evaluate(anchors).grad
        assert relative(rounded, exact.double()) > 1e-4


@pytest.mark.parametrize("name", ["llama-mlp", "roberta", "open_clip"])
def test_a_part_that_holds_all_anchors_changes_no_bit(name):
    layer, finetuned = make_blocks(name, 2, 1e-2, torch.float32)
    anchors = make_anchors(2, ANCHORS, TOKENS, torch.float32)
    whole = program(layer, finetuned).evaluate(anchors)
    held = program(layer, finetuned, part=ANCHORS).evaluate(anchors)
    for what in ("loss", "cosines", "grad"):
        assert torch.equal(getattr(whole, what), getattr(held, what))


@pytest.mark.parametrize("kind", list(STACKS))
def test_nothing_waits_for_the_device_and_nothing_is_kept(kind):
    layer, finetuned = make_layers(kind, tasks=2, ratio=0.1, dtype=torch.float32)
    anchors = make_anchors(2, 7, 5, torch.float32, width=12)
    problem = program(layer, finetuned, tokens=5, build=layer.program, part=3)
    problem.evaluate(anchors)
    with HostReads() as reads:
        problem.evaluate(anchors)
    assert not reads.found
    for leaf in problem._root.leaves():
        rows = [v for v in vars(leaf).values() if isinstance(v, torch.Tensor) and v.dim() == 3]
        assert not [v for v in rows if v.shape[:2] in ((2, 15), (2, 5), (2, 35))]
        assert leaf.direction is None
    assert not any(problem._alignment._totals) and not problem._alignment._directions


def test_task_vectors_as_factors():
    layer, _ = make_blocks("llama-mlp", 1, 0.0, width=48)
    generator = torch.Generator().manual_seed(3)
    finetuned = []
    for _ in range(2):
        tuned, factors = copy.deepcopy(layer), {}
        for name, p in tuned.named_parameters():
            left, right = (
                torch.randn(shape, generator=generator, dtype=p.dtype)
                for shape in ((p.shape[0], 2), (2, p.shape[1]))
            )
            factors[name] = 0.01 * left, right
            p.data += 0.01 * left @ right
        attach_factors(tuned, factors)
        finetuned.append(tuned)
    anchors = make_anchors(2, ANCHORS, TOKENS, width=48)
    expected = AutogradProblem(layer, finetuned).evaluate(anchors)
    for part in PARTS:
        split = program(layer, finetuned, part=part)
        assert_same(split.evaluate(anchors), expected)
        assert all(leaf._A is not None for leaf in split._root.leaves() if leaf.parameters())


def adaptations(distance, precision, part):
    layer, finetuned = make_layers("pre_norm", tasks=2, ratio=0.1)
    dtype = torch.float64 if precision == "float64" else torch.float32
    tasks = [
        (make_anchors(1, n, 4, dtype, seed=n, width=12)[0], tuned.to(dtype))
        for n, tuned in zip((7, 6), finetuned, strict=True)
    ]
    layer = layer.to(dtype)
    name = "fp32" if precision == "float64" else precision
    options = dict(distance=distance, part=part)
    return [
        ProgramAdaptation(
            layer.program, layer, tasks, precision=PRECISIONS[name], dtype=dtype, **options
        ),
        AutogradAdaptation(layer, tasks, **options),
    ]


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("float64", 1e-10), ("bf16", 2e-2), ("bf16 native", 2e-2)],
)
def test_adaptation(distance, precision, tolerance):
    index = torch.randperm(13, generator=torch.Generator().manual_seed(0))[:11]
    wholes, splits = (adaptations(distance, precision, part) for part in (None, 3))
    for whole, split in zip(wholes, splits, strict=True):
        for problem in (whole, split):
            for seed, delta in enumerate(problem.deltas.values()):
                generator = torch.Generator().manual_seed(seed)
                noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
                delta.copy_(0.01 * noise)
            problem.refresh()
            problem.evaluate(index[:2])  # its gradients must not be added to
        expected, loss = whole.evaluate(index), split.evaluate(index)
        assert torch.allclose(loss.double(), expected.double(), rtol=tolerance)
        for name in whole.parameter_names:
            assert relative(split.gradients[name], whole.gradients[name].double()) < tolerance


def test_what_cannot_be_a_part_is_refused():
    layer, finetuned = make_blocks("llama-mlp", 1, 0.1)
    for engine in ("program", "autograd"):
        with pytest.raises(InputError, match="at least 1 anchor"):
            layers.bind(layer, finetuned, shape=(4, 24), engine=engine, part=0)
    objective = Objective(torch.sum, (4, TOKENS))
    with pytest.raises(InputError, match="not an objective"):
        program(layer, finetuned, objective=objective, part=2)
