"""Whole steps on a card that computes nothing: devices, host reads, types of products, launches.

``benchmarks/fake_card.py`` says what such a run finds. The launchers of the kernels are the real
ones; what the kernels compute is checked in tests/kernels and, on a card, in tests/gpu.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from blocks import BLOCKS, make_blocks
from fake_card import FakeCard, put_on_card

from fda_fast.layers.adaptation import ProgramAdaptation
from fda_fast.layers.autograd import AutogradProblem
from fda_fast.layers.factored import attach_factors
from fda_fast.layers.graph import AnchorOptimiser
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision
from fda_fast.layers.problem import ProgramProblem
from fda_fast.layers.recognise import recognise
from fda_fast.ops import alignment, coefficients

WIDTH, TOKENS, ANCHORS, TASKS = 32, 6, 8, 2
# "tf32" is "fp32" there with a switch of the matrix library set.
PRECISIONS = ("fp32", "bf16")
CARD = torch.device("cuda", 0)


@contextlib.contextmanager
def entered(card, name, tasks=TASKS, width=WIDTH):
    """The card's context with a block, fine-tuned ones and anchors there."""
    layer, finetuned = make_blocks(name, tasks, 1e-2, torch.float32, width=width)
    recipe = recognise(layer)  # which evaluates activations
    with card:
        for one in (layer, *finetuned):
            put_on_card(one)
        yield recipe, layer, finetuned, torch.empty((tasks, ANCHORS, TOKENS, width), device=CARD)


def optimiser_of(recipe, layer, finetuned, anchors, precision, part=None):
    materials = Materials(layer, finetuned, tokens=TOKENS, precision=Precision(precision, CARD))
    problem = ProgramProblem(recipe.build(materials), materials, part=part)
    return AnchorOptimiser(problem, anchors, steps=4, lr=1e-2)


def run(card, optimiser):
    """One step as it is, which may fill caches, and one as a graph would record it."""
    optimiser.step()
    with card.recording():
        optimiser.step()


@pytest.mark.parametrize("name", BLOCKS)
def test_construction(name):
    card = FakeCard()
    with entered(card, name) as case:
        for precision in PRECISIONS:
            card.products.clear()
            optimiser = optimiser_of(*case, precision)
            run(card, optimiser)
            wanted = torch.bfloat16 if precision == "bf16" else torch.float32
            assert card.products[wanted] >= 0.8 * sum(card.products.values())
    assert {"adamw_step", "alignment_evaluate"} <= set(card.launches)


@pytest.mark.parametrize("accumulates", [True, False], ids=["sums", "sums apart"])
@pytest.mark.parametrize("name", ["llama-mlp", "roberta"])
def test_construction_by_triton_alone(name, accumulates):
    """As installed without nvcc; "sums apart" is torch 2.8 and 2.9."""
    card = FakeCard("triton", accumulates)
    with entered(card, name) as case:
        run(card, optimiser_of(*case, "bf16"))
    assert {"_adamw_step_kernel", "_alignment_partial_kernel"} <= set(card.launches)


@pytest.mark.parametrize("name", ["llama-mlp", "clip"])
def test_construction_in_parts(name):
    card = FakeCard()
    with entered(card, name) as case:
        run(card, optimiser_of(*case, "bf16", part=3))


def test_construction_of_lora_experts():
    card = FakeCard()
    with entered(card, "llama-mlp", width=128) as (recipe, layer, finetuned, anchors):
        for one in finetuned:
            shapes = {n: p.shape for n, p in one.named_parameters()}
            attach_factors(
                one,
                {
                    n: (torch.empty(m, 2, device=CARD), torch.empty(2, k, device=CARD))
                    for n, (m, k) in shapes.items()
                },
            )
        run(card, optimiser_of(recipe, layer, finetuned, anchors, "fp32"))


@pytest.mark.parametrize(("name", "part"), [("llama", None), ("clip", 3), ("gpt2", None)])
def test_autograd_engine(name, part):
    """Layers that are not recognised: a graph can record double backward too.

    On the meta device: torch's engine runs no backward for a card that is not there.
    """
    card = FakeCard()
    with entered(card, name) as (_, layer, finetuned, anchors):
        for one in (layer, *finetuned):
            put_on_card(one, "meta")
        anchors = torch.empty(anchors.shape, device="meta")
        with mock.patch.object(torch.Tensor, "any", lambda _: True):  # of each task vector, once
            problem = AutogradProblem(layer, finetuned, zero_gradient=(), part=part)
        problem.evaluate(anchors)
        with card.recording():
            problem.evaluate(anchors)


@pytest.mark.parametrize(
    ("name", "distance"),
    [("llama-mlp", "l2"), ("phi3", "cosine"), ("gpt2", "l2"), ("dinov2", "cosine")],
)
def test_adaptation(name, distance):
    card = FakeCard()
    with entered(card, name) as (recipe, layer, finetuned, anchors):
        tasks = list(zip(anchors, finetuned, strict=True))
        for precision in PRECISIONS:
            problem = ProgramAdaptation(
                recipe.build, layer, tasks, distance=distance, precision=Precision(precision, CARD)
            )
            optimizer = torch.optim.Adam(list(problem.deltas.values()))
            for count in (1, 2):
                problem.evaluate(torch.arange(5))
                for key, delta in problem.deltas.items():
                    delta.grad = grad = problem.gradients[key]
                    alpha = torch.zeros((2, *grad.shape), device=CARD)
                    moments = torch.zeros_like(grad), torch.zeros_like(grad)
                    coefficients.update_(alpha, alpha, grad, *moments, delta, count, lr=1e-2)
                optimizer.step()
                problem.refresh()


def test_what_the_card_refuses():
    """The checks above can fail."""
    with FakeCard("triton") as card:
        x = torch.empty((1, 4, 4), device=CARD)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            x.sum().item()
        with pytest.raises(RuntimeError):
            x + torch.empty((4, 4))
        with card.recording(), pytest.raises(AssertionError, match="host"):
            x.new_tensor(1.0)
        with card.recording(), pytest.raises(AssertionError, match="host"):
            x.cpu()
        with pytest.raises(AssertionError, match="strides"):
            alignment.dots(x.mT, x, x, [4])
        with pytest.raises(AssertionError, match="is on cpu"):
            alignment.dots(x, torch.empty(1, 4, 4), x, [4])
