"""Whole construction steps on the CUDA C++ kernels: what the engine hands them, how often."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fda_fast.layers.autograd import AutogradProblem
from fda_fast.layers.graph import AnchorOptimiser
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision
from fda_fast.layers.problem import ProgramProblem
from fda_fast.layers.recognise import recognise
from fda_fast.ops import dispatch

sys.path.insert(0, str(Path(__file__).parents[1] / "layers"))

from blocks import in_float64, make_anchors, make_blocks

STEPS = 2


def construct(layer, finetuned, anchors, tokens):
    materials = Materials(layer, finetuned, tokens=tokens, precision=Precision("fp32"))
    problem = ProgramProblem(recognise(layer).build(materials), materials)
    optimiser = AnchorOptimiser(problem, anchors, steps=STEPS, lr=1e-2)
    first = problem.evaluate(anchors)
    for _ in range(STEPS):
        optimiser.step()
    return first, optimiser


@pytest.mark.parametrize("name", ["roberta", "clip", "llama-mlp"])
def test_steps_lose_no_more_than_on_the_twins(name, module, monkeypatch):
    tokens, tasks = 2, 2
    layer, finetuned = make_blocks(name, tasks, 1e-1, torch.float32)
    anchors = make_anchors(tasks, 3, tokens, torch.float32)
    oracle = AutogradProblem(in_float64(layer), [in_float64(one) for one in finetuned])
    gold = oracle.evaluate(anchors.double())
    found = {}
    for backend in ("torch", "cuda"):
        monkeypatch.setenv("FDA_FAST_BACKEND", backend)
        module.take_log()
        found[backend] = construct(layer, finetuned, anchors, tokens)
    launches = Counter(kernel.split("<")[0] for kernel, *_ in module.take_log())
    assert launches["step_kernel"] == launches["record_kernel"] == STEPS
    # Sums, cosines, loss and coefficients of all parameters of a layer; one evaluation more.
    assert launches["sum_kernel"] == launches["finish_kernel"] == STEPS + 1
    assert launches["coefficients_kernel"] == 0

    def error(backend, what):
        expected = getattr(gold, what)
        difference = getattr(found[backend][0], what).double() - expected
        return (difference.norm() / expected.norm()).item()

    for what in ("grad", "loss", "cosines"):
        allowed = 2 * error("torch", what) + torch.finfo(torch.float32).eps
        assert error("cuda", what) <= allowed, what
    expected, out = found["torch"][1], found["cuda"][1]
    torch.testing.assert_close(out.history, expected.history)
    torch.testing.assert_close(out.anchors, expected.anchors, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.best_loss, expected.best_loss)


def test_the_kernels_serve_the_step(module, monkeypatch):
    monkeypatch.setenv("FDA_FAST_BACKEND", "cuda")
    for stem, package in (("alignment", "cuda"), ("adamw", "cuda"), ("norm", "reference")):
        found = dispatch.implementation(stem, torch.zeros(1))
        assert found.__name__ == f"fda_fast.ops.{package}.{stem}"
