"""What the rows of a GPU will take, counted without one: operations, bytes, and times from them.

Every engine runs two steps on the shapes alone (fake_card.py): ours as on a card, launchers
included, the others on torch's meta device. Times are operations over the rates below, so the
least that a card can need; bytes are those that torch's tensors hold at the height of a step,
beyond layers and anchors. The compiler of the compiled peer saves bytes and takes time that only
a card shows.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any
from unittest import mock

import torch
from bench_step import RATIOS, variants
from cases import CASES, Case
from fake_card import FakeCard, put_on_card
from peers import PARTS, Compiled, Published

from fda_fast.layers.autograd import AutogradProblem
from fda_fast.layers.graph import AnchorOptimiser
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision
from fda_fast.layers.problem import ProgramProblem
from fda_fast.layers.recognise import recognise

# TFLOP/s assumed of an H100, and of its float64 units.
RATES = {"fp32": 52, "tf32": 400, "bf16": 790}
FLOAT64_RATE = 50
# Steps that card.py runs for one timed row besides those it times.
_OTHER_STEPS = 11
# Seconds assumed of torch.compile for one shape and precision.
_COMPILE_SECONDS = 60


def shapes_of(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, list, tuple]:
    """The layers of a case without values, and the shape of its anchors."""
    with torch.device("meta"):
        pretrained = case.build().eval().to(dtype)
    return pretrained, [copy.deepcopy(pretrained) for _ in range(case.tasks)], case.shape


def count_ours(case: Case, precision: str, part: int | None = None) -> FakeCard:
    """A step of this package; the layers, task vectors and state included in ``peak``."""
    pretrained, finetuned, shape = shapes_of(case)
    # Outside: recognition compares by value. A block is run on a little input, an MLP is not.
    recipe = recognise(pretrained if len(shape) == 2 else case.build().eval())
    with FakeCard() as card:
        for layer in (pretrained, *finetuned):
            put_on_card(layer)
        anchors = torch.empty((case.tasks, *shape), device="cuda")
        card.given = card.held
        tokens = shape[1] if len(shape) == 3 else 1
        materials = Materials(
            pretrained, finetuned, tokens=tokens, precision=Precision(precision, "cuda")
        )
        problem = ProgramProblem(recipe.build(materials), materials, part=part)
        optimiser = AnchorOptimiser(problem, anchors, steps=1, lr=1e-2)
        optimiser.step()
        card.reset()
        with card.recording():
            optimiser.step()
    return card


def count_published(case: Case) -> FakeCard:
    """A step of the published loop."""
    pretrained, finetuned, shape = shapes_of(case)
    card = FakeCard()
    with card, mock.patch.object(torch.Tensor, "item", lambda _: 1.0):
        for layer in (pretrained, *finetuned):
            put_on_card(layer, "meta")
        anchors = torch.empty((case.tasks, *shape), device="meta")
        card.given = card.held
        engine = Published(pretrained, finetuned, anchors, case.published_grads == "both")
        engine.step()
        card.reset()
        engine.step()
    return card


def count_compiled(case: Case) -> FakeCard:
    """A step of functional gradients, before compilation: its operations alone are of use."""
    pretrained, finetuned, shape = shapes_of(case)
    with FakeCard() as card:
        for layer in (pretrained, *finetuned):
            put_on_card(layer, "meta")
        engine = Compiled(pretrained, finetuned, torch.empty((case.tasks, *shape), device="meta"))
        engine._both = engine._eager
        card.reset()
        engine.gradient(engine.anchors)
    return card


def count_oracle(case: Case) -> FakeCard:
    """Float64 double backward at the checked anchors; the float32 layers are there beside it."""
    pretrained, finetuned, shape = shapes_of(case, torch.float64)
    rows = case.checked or shape[0]
    card = FakeCard()
    with card, mock.patch.object(torch.Tensor, "any", lambda _: True):
        for layer in (pretrained, *finetuned):
            put_on_card(layer, "meta")
        anchors = torch.empty((case.tasks, rows, *shape[1:]), device="meta", dtype=torch.float64)
        problem = AutogradProblem(pretrained, finetuned, zero_gradient=())
        card.reset()
        problem.evaluate(anchors)
    return card


def count(case: Case, variant: tuple[str, str, str]) -> FakeCard:
    engine, precision, _ = variant
    if engine == "published":
        return count_published(case)
    if engine == "compiled":
        return count_compiled(case)
    part = max(1, case.shape[0] // PARTS) if engine == "fda_fast_parts" else None
    return count_ours(case, precision, part)


def seconds_of_row(milliseconds: float, repeats: int) -> float:
    """What card.py spends on a row whose step takes so long."""
    timed = repeats * (int(50 / milliseconds) + 1)
    return (timed + _OTHER_STEPS) * milliseconds / 1e3


def main(names: list[str], options: argparse.Namespace) -> None:
    total = 0.0
    for name in names:
        case, spent = CASES[name], 0.0
        ratios = len(RATIOS) if options.fidelity else 1
        gold = count_oracle(case)
        oracle = gold.flops / FLOAT64_RATE / 1e12
        print(
            f"{name}: oracle {gold.flops / 1e12:.2f} TFLOP, {oracle:.2f} s, "
            f"{gold.peak / 1e9:.1f} GB in all, {ratios} times"
        )
        for variant in variants("cuda", options.compile):
            card = count(case, variant)
            milliseconds = card.flops / RATES[variant[1]] / 1e9
            spent += seconds_of_row(milliseconds, options.repeats)
            spent += ratios * milliseconds / 1e3
            spent += _COMPILE_SECONDS if variant[0] == "compiled" else 0
            bytes_ = f"{(card.peak - card.given) / 1e9:7.2f} GB, {card.peak / 1e9:6.2f} in all"
            print(
                f"  {variant[0]:14s} {variant[1]:5s} {card.flops / 1e12:8.3f} TFLOP "
                f"{milliseconds:9.2f} ms  {'' if variant[0] == 'compiled' else bytes_}",
                flush=True,
            )
        spent += ratios * oracle
        total += spent
        print(f"  about {math.ceil(spent)} s")
    print(f"in all about {total / 60:.0f} min")
