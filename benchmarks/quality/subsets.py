"""How the gain depends on the number of tasks that are merged.

    python benchmarks/quality/subsets.py vision

Merges of one, two, four and all tasks, each by Task Arithmetic, TSV-M and FDA from
both and from the pretrained model, with the suite's anchors. A method's choices are made on the
validation split, subset by subset. Reported is the share of the experts' gain over the pretrained
model that the merge keeps, over all tasks of all subsets of a size.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import methods
import neighbours  # noqa: F401
import torch
from common import write_json
from run import STARTS, Runner, load_suite
from suite import Scores, Suite
from torch import Tensor

SIZES = (1, 2, 4, 6)
"""Numbers of tasks; all of them for the vision suite."""
FREE = ((1e-4, 1e-3), (25, 100))
"""Rates and epochs to choose from for the weights: fewer tasks bear more of both."""


def subset(suite: Suite, tasks: Sequence[str]) -> Suite:
    """The suite with some of its experts."""
    part = copy.copy(suite)
    part.experts = {task: suite.experts[task] for task in tasks}
    kept = {task: suite.record["experts"][task] for task in tasks}
    part.record = {**suite.record, "experts": kept}
    part.grid = dataclasses.replace(suite.grid, weights=FREE)
    return part


def merge(suite: Suite, anchors: Sequence[Tensor], source: dict[str, Any]) -> dict[str, Scores]:
    """Test accuracies by method."""
    runner = Runner(suite)
    found = {
        "pretrained": suite.score(suite.pretrained, "test"),
        "individual experts": suite.score_experts("test"),
    }
    starts = ["pretrained"]
    if len(suite.tasks) > 1:
        starts += ["task_arithmetic", "tsv"]
        for method in starts[1:]:
            found[STARTS[method]] = runner.sweep_start(method)["scores"]
    for start in starts:
        settings = runner.tune_fda(start, anchors, source)
        unit = runner.fda(start, anchors, source, {**settings, "seed": 0})
        found[f"FDA from {STARTS[start]}"] = unit["scores"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("vision", "text"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    suite = load_suite(args.suite)
    anchors, _ = methods.construct(suite, seed=0)
    rows = []
    count = len(suite.tasks)
    for size in SIZES:
        # Windows over the suite's order, as a ring: every task is in as many as any other.
        for first in range(0, count, {1: 1, count: count}.get(size, 2)):
            chosen = [(first + i) % count for i in range(size)]
            part = subset(suite, [suite.tasks[i] for i in chosen])
            own = [layer[chosen] for layer in anchors]
            scores = merge(part, own, methods.settings_of(suite))
            rows.append({"tasks": part.tasks, "scores": scores})
    payload = {"suite": suite.name, "rows": rows}
    print(f"recorded in {write_json(f'quality-subsets-{suite.name}', payload)}")


if __name__ == "__main__":
    main()
