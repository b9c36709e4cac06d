"""Results of the suites as Markdown: the README's tables, and the paper's claims one by one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np

Result = dict[str, Any]
Row = dict[str, Any]

INITS = {"weights": "weights", "gaussian": "Gauss"}


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text, the rest numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def averages(row: Row) -> list[float]:
    """Mean accuracy over the tasks for every seed, in per cent."""
    return [100 * statistics.fmean(seed) for seed in zip(*row["scores"].values(), strict=True)]


def normalised(row: Row, experts: Row) -> float:
    """Mean over tasks of accuracy relative to the task's expert, in per cent."""
    shares = [
        statistics.fmean(values) / experts["scores"][task][0]
        for task, values in row["scores"].items()
    ]
    return 100 * statistics.fmean(shares)


def spread(values: list[float], sign: str = "") -> str:
    """Mean, and with several values their standard deviation."""
    text = f"{statistics.fmean(values):{sign}.1f}"
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


def find(result: Result, method: str, **wanted: Any) -> Row:
    """The row of a method; ``wanted`` are further fields it must have."""
    for row in result["rows"]:
        if row["method"] == method and all(row.get(k) == v for k, v in wanted.items()):
            return row
    raise KeyError(f"{result['suite']}: {method} {wanted}")


def gains(result: Result, row: Row) -> list[float]:
    """Points over the row's starting point, for every seed."""
    (start,) = averages(find(result, row["start"]))
    return [value - start for value in averages(row)]


def name_of(row: Row) -> str:
    init = INITS.get(row.get("init", ""))
    return f"{row['method']} ({init})" if init else row["method"]


def cost(row: Row) -> str:
    """Processor seconds: construction + what follows."""
    after = statistics.fmean(row["seconds"])
    if "construct_seconds" in row:
        return f"{statistics.fmean(row['construct_seconds']):.0f} + {after:.0f}"
    return f"{after:.1f}" if after else ""


def method_table(result: Result, which: str = "tuned") -> tuple[list[str], list[list[str]]]:
    """Header and rows: every method's accuracy, spread, gain and cost."""
    experts = find(result, "individual experts")
    head = ["accuracy, %", *result["tasks"], "average", "normalised", "gain", "seconds"]
    cells = []
    for row in result["rows"]:
        fda = row["method"].startswith("FDA")
        if row.get("which", which) != which or (which == "published" and "init" in row and not fda):
            continue
        tasks = [f"{100 * statistics.fmean(values):.1f}" for values in row["scores"].values()]
        gain = spread(gains(result, row), "+") if "start" in row else ""
        cells.append([name_of(row), *tasks, spread(averages(row)),
                      f"{normalised(row, experts):.1f}", gain, cost(row)])  # fmt: skip
    return head, cells


def unpack(right: str, count: int) -> np.ndarray:
    """Booleans [count] of ``suite.pack``."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(right), np.uint8), count=count).astype(bool)


def sampling_error(result: Result, row: Row, other: Row) -> float:
    """Standard error of a difference of average accuracies by the choice of test examples, points.

    Both rows are scored on the same examples, so what counts is how the difference varies from
    example to example, seeds averaged. Without the examples (the demo) it is the error of one
    model, an upper bound.
    """
    variances = []
    for task, sizes in result["tasks"].items():
        count = sizes["test"]
        if "right" in row and "right" in other:
            mine, theirs = (
                np.mean([unpack(seed, count) for seed in one["right"][task]], axis=0)
                for one in (row, other)
            )
            variances.append((mine - theirs).var(ddof=1) / count)
        else:
            (p,) = find(result, "individual experts")["scores"][task]
            variances.append(p * (1 - p) / count)
    return float(100 * math.sqrt(sum(variances)) / len(variances))


def verdict(values: Iterable[float], error: float) -> str:
    """ "confirmed" or "contradicted" beyond twice the error of the mean, else "no difference".

    The error joins the spread over seeds and the sampling error of the test set.
    """
    values = list(values)
    seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    mean = statistics.fmean(values)
    if abs(mean) <= 2 * math.hypot(seeds, error):
        return "no difference"
    return "confirmed" if mean > 0 else "contradicted"


def from_demo(result: Result) -> Result:
    """The demo's result (LoRA experts, weight-initialised anchors) in the shape of a suite's."""
    rows = [
        row | ({"init": "weights", "which": "tuned"} if row["start"] else {})
        for row in result["rows"]
    ]
    sizes = {task: {"test": result["texts_per_task"]} for task in rows[0]["scores"]}
    return result | {"suite": "demo", "tasks": sizes, "rows": rows}


def claims(result: Result, which: str = "tuned") -> list[list[str]]:
    """Rows (claim, anchors, points, verdict) of the paper's claims on one suite."""
    inits = {
        init: label
        for init, label in INITS.items()
        if any(row.get("init") == init for row in result["rows"])
    }
    found = []

    def add(claim: str, label: str, row: Row, other: Row) -> None:
        less = averages(other)
        less = less * len(averages(row)) if len(less) == 1 else less
        points = [a - b for a, b in zip(averages(row), less, strict=True)]
        judged = verdict(points, sampling_error(result, row, other))
        found.append([claim, label, spread(points, "+"), judged])

    def fda(start: str, init: str) -> Row:
        return find(result, f"FDA from {start}", init=init, which=which)

    for init, label in inits.items():
        row = fda("pretrained", init)
        add("FDA improves the pretrained model", label, row, find(result, "pretrained"))
        add("FDA from pretrained beats Task Arithmetic", label, row,
            find(result, "Task Arithmetic"))  # fmt: skip
        for start in ("Task Arithmetic", "TSV-M", "WUDI"):
            add(f"FDA improves {start}", label, fda(start, init), find(result, start))
    for start in ("pretrained", "Task Arithmetic", "TSV-M", "WUDI") if len(inits) == 2 else ():
        one, other = (fda(start, init) for init in INITS)
        add(f"weights better than Gauss, from {start}", "both", one, other)
    return found
