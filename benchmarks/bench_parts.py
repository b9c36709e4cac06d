"""A construction step with the anchors of one expert in parts: memory and time of 1 to 16 parts.

    python benchmarks/bench_parts.py
    python benchmarks/bench_parts.py --cases vit_b32_block --repeats 1      # keeps the other rows

Processor seconds of one thread, all numbers of parts in turn. Memory is what a step takes beyond
both layers, task vectors, anchors and the optimiser's moments, in a process of its own. Beside each
time stands the error of dL/dX against the same program in float64, which the tests hold against
autograd.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from cases import CASES, Case, make
from common import (
    RESULTS,
    environment,
    interleaved,
    peak_memory,
    ratio,
    slug,
    summary,
    write_json,
)

from fda_fast import layers
from fda_fast.layers.graph import AnchorOptimiser
from fda_fast.ops import memory
from fda_fast.testing import relative_error

CHANGE = 1e-2
PARTS = (1, 2, 4, 8, 16)


def case_of(name: str) -> Case:
    if name == "swiglu_1024_8192":
        return replace(CASES["swiglu_1024"], shape=(8192, 1024))
    return CASES[name]


def part_of(case: Case, parts: int) -> int | None:
    return None if parts == 1 else math.ceil(case.shape[0] / parts)


def step(name: str, parts: int) -> Callable[[], None]:
    """One step, with the optimiser's state already in memory."""
    case = case_of(name)
    pretrained, finetuned, anchors = make(case, CHANGE)
    problem = layers.bind(
        pretrained, finetuned, shape=case.shape, engine="program", part=part_of(case, parts)
    )
    optimiser = AnchorOptimiser(problem, anchors, steps=1, lr=1e-2)
    for state in (optimiser._exp_avg, optimiser._exp_avg_sq):
        state.fill_(0)
    memory.trim()
    return optimiser.step


def run(name: str, repeats: int, warmup: int) -> list[dict[str, object]]:
    case = case_of(name)
    taken = {parts: peak_memory(step, name, parts) for parts in PARTS}
    pretrained, finetuned, anchors = make(case, CHANGE)
    wide = [copy.deepcopy(layer).double() for layer in (pretrained, *finetuned)]
    oracle = layers.bind(wide[0], wide[1:], shape=case.shape, engine="program")
    gold = oracle.evaluate(anchors.double()).grad
    del oracle, wide
    memory.trim()
    problems = {
        str(parts): layers.bind(
            pretrained, finetuned, shape=case.shape, engine="program", part=part_of(case, parts)
        )
        for parts in PARTS
    }
    found = {}

    def evaluate(parts: str) -> None:
        found[parts] = problems[parts].evaluate(anchors).grad

    seconds = interleaved(
        {parts: lambda parts=parts: evaluate(parts) for parts in problems},
        repeats=repeats,
        warmup=warmup,
        clock=time.process_time,
    )
    errors = {parts: relative_error(grad, gold) for parts, grad in found.items()}
    return [
        {
            "case": name,
            "anchors": list(case.shape),
            "parts": parts,
            "part": part_of(case, parts) or case.shape[0],
            **summary(seconds[str(parts)]),
            "slowdown": ratio(seconds, str(parts), "1"),
            "error": errors[str(parts)],
            "mib": round(taken[parts]["peak_mib"] - taken[parts]["before_mib"], 1),
            "anchors_mib": round(anchors.nbytes / 2**20, 1),
        }
        for parts in PARTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["vit_b32_block", "swiglu_1024_8192"]
    parser.add_argument("--cases", nargs="+", default=known, choices=[*known, "minilm_layer"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / slug(environment()["cpu"]) / "parts.json"
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in before if row["case"] not in arguments.cases]
    for name in arguments.cases:
        for row in run(name, arguments.repeats, arguments.warmup):
            rows.append(row)
            print(
                f"{name:20s} {row['parts']:3d} parts {row['ms_median']:9.1f} ms "
                f"{row['slowdown']}x   error {row['error']:.1e}   {row['mib']:.0f} MiB",
                flush=True,
            )
    print(environment())
    print(write_json("parts", {"rows": rows}))


if __name__ == "__main__":
    main()
