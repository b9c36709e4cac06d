"""Results of the suites as Markdown: the README's tables, and the paper's claims one by one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

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


def sampling_error(result: Result) -> float:
    """Standard error of an average accuracy by the choice of test examples, in points."""
    experts = find(result, "individual experts")["scores"]
    variance = [p * (1 - p) / result["tasks"][t]["test"] for t, (p,) in experts.items()]
    return 100 * math.sqrt(sum(variance)) / len(variance)


def verdict(values: Iterable[float], error: float) -> str:
    """ "confirmed" or "contradicted" beyond twice the error of the mean, else "no difference".

    The error joins the spread over seeds and the sampling error of the test set, which is an
    upper bound: both models of a difference are scored on the same examples.
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
    error = sampling_error(result)
    found = []

    def add(claim: str, init: str, values: list[float]) -> None:
        found.append([claim, init, spread(values, "+"), verdict(values, error)])

    (arithmetic,) = averages(find(result, "Task Arithmetic"))
    for init, label in inits.items():
        row = find(result, "FDA from pretrained", init=init, which=which)
        add("FDA improves the pretrained model", label, gains(result, row))
        add("FDA from pretrained beats Task Arithmetic", label,
            [value - arithmetic for value in averages(row)])  # fmt: skip
        for start in ("Task Arithmetic", "TSV-M", "WUDI"):
            row = find(result, f"FDA from {start}", init=init, which=which)
            add(f"FDA improves {start}", label, gains(result, row))
    for start in ("pretrained", "Task Arithmetic", "TSV-M", "WUDI") if len(inits) == 2 else ():
        one, other = (
            averages(find(result, f"FDA from {start}", init=init, which=which)) for init in INITS
        )
        difference = [a - b for a, b in zip(one, other, strict=True)]
        add(f"weights better than Gauss, from {start}", "both", difference)
    return found
