"""Whole construction steps on the Triton kernels: every node of a program through the interpreter.

The dry run of what a card will do, up to the matrix products and the hardware's own arithmetic.
"""

import sys
from pathlib import Path

import pytest
import torch

from fda_fast.layers.autograd import AutogradProblem
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision
from fda_fast.layers.problem import ProgramProblem
from fda_fast.layers.recognise import recognise
from fda_fast.ops import dispatch

sys.path.insert(0, str(Path(__file__).parents[1] / "layers"))

from blocks import in_float64, make_anchors, make_blocks

STEMS = ("activation", "gated", "norm", "attention", "similarity", "alignment", "adamw")


def evaluate(layer, finetuned, anchors, tokens, backend, monkeypatch):
    monkeypatch.setenv("FDA_FAST_BACKEND", backend)
    found = {stem: dispatch.implementation(stem, anchors).__name__ for stem in STEMS}
    package = {"triton": "fda_fast.kernels", "torch": "fda_fast.ops.reference"}[backend]
    assert found == {stem: f"{package}.{stem}" for stem in STEMS}
    materials = Materials(layer, finetuned, tokens=tokens, precision=Precision("fp32"))
    return ProgramProblem(recognise(layer).build(materials), materials).evaluate(anchors)


@pytest.mark.parametrize(
    ("name", "tasks", "ratio"),
    [("llama-mlp", 2, 1e-1), ("llama-mlp", 1, 1e-4), ("open_clip", 1, 1e-1), ("roberta", 1, 1e-4)],
)
def test_a_step_loses_no_more_than_on_the_twins(name, tasks, ratio, monkeypatch):
    tokens = 2
    layer, finetuned = make_blocks(name, tasks, ratio, torch.float32)
    anchors = make_anchors(tasks, 2, tokens, torch.float32)
    oracle = AutogradProblem(in_float64(layer), [in_float64(one) for one in finetuned])
    gold = oracle.evaluate(anchors.double())
    out = evaluate(layer, finetuned, anchors, tokens, "triton", monkeypatch)
    twins = evaluate(layer, finetuned, anchors, tokens, "torch", monkeypatch)
    autograd = AutogradProblem(layer, finetuned).evaluate(anchors)

    def error(result, what):
        expected = getattr(gold, what)
        return ((getattr(result, what).double() - expected).norm() / expected.norm()).item()

    for what in ("grad", "loss", "cosines"):
        allowed = max(error(twins, what), error(autograd, what))
        assert error(out, what) <= 2 * allowed + torch.finfo(torch.float32).eps, what
    if ratio == 1e-4:
        # The kernels' differences do not cancel, so small differences cost them nothing.
        assert error(out, "grad") < 0.1 * error(autograd, "grad")
