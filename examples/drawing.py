"""The demo's result as a table for a terminal, a table for a README, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass
class Row:
    """One method: accuracies in [0, 1] by task, one entry per seed (one if it has no seed)."""

    method: str
    start: str = ""  # the method an FDA row is compared with
    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, scores: Mapping[str, float]) -> None:
        for task, value in scores.items():
            self.scores.setdefault(task, []).append(value)

    def cell(self, task: str) -> str:
        return f"{100 * statistics.fmean(self.scores[task]):.1f}"

    def averages(self) -> list[float]:
        """Mean over the tasks for every seed, in per cent."""
        return [100 * statistics.fmean(seed) for seed in zip(*self.scores.values(), strict=True)]

    @property
    def average(self) -> float:
        return statistics.fmean(self.averages())

    def average_cell(self) -> str:
        """Mean and, with several seeds, their standard deviation."""
        return _with_spread(self.averages())

    def gain(self, rows: Mapping[str, Row]) -> list[float]:
        """Points gained over the start on average over tasks, for every seed."""
        return [value - rows[self.start].average for value in self.averages()]


def _with_spread(values: list[float], sign: str = "") -> str:
    text = f"{statistics.fmean(values):{sign}.1f}"
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


def as_record(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as JSON values; ``from_record`` reads them."""
    return [{"method": r.method, "start": r.start, "scores": r.scores} for r in rows]


def from_record(record: list[dict[str, Any]]) -> list[Row]:
    return [Row(**values) for values in record]


def _cells(rows: list[Row]) -> list[list[str]]:
    by_name = {row.method: row for row in rows}
    return [
        [
            row.method,
            *(row.cell(task) for task in row.scores),
            row.average_cell(),
            _with_spread(row.gain(by_name), "+") if row.start else "",
        ]
        for row in rows
    ]


def _header(rows: list[Row]) -> list[str]:
    return ["accuracy, %", *rows[0].scores, "average", "gain over its start"]


def terminal_table(rows: list[Row]) -> Table:
    table = Table(*_header(rows)[:1], title="Held-out accuracy of one model on all tasks")
    for name in _header(rows)[1:]:
        table.add_column(name, justify="right")
    for cells in _cells(rows):
        table.add_row(*cells, style="bold" if cells[-1] else "")
    return table


def markdown_table(rows: list[Row]) -> str:
    head = _header(rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *_cells(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def picture(rows: list[Row], path: Path) -> None:
    """Bars of the average over tasks beside points for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(rows[0].scores)
    figure, axes = plt.subplots(figsize=(9, 0.48 * len(rows) + 1.4), layout="constrained")
    markers = "osD^vP*X"
    for y, row in enumerate(rows):
        colour = "#c8553d" if row.start else ("#9aa5b1" if "expert" in row.method else "#588b8b")
        spread = row.averages()
        error = statistics.stdev(spread) if len(spread) > 1 else 0
        axes.barh(y, row.average, xerr=error or None, color=colour, alpha=0.85, height=0.62)
        axes.text(row.average - 0.8, y, f"{row.average:.1f}", va="center", ha="right", color="w",
                  fontweight="bold", fontsize=9)  # fmt: skip
        for task, marker in zip(tasks, markers, strict=False):
            value = 100 * statistics.fmean(row.scores[task])
            axes.plot(value, y, marker, color="#22303c", ms=4.5, mfc="none",
                      label=task if y == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.invert_yaxis()
    low = min(100 * min(min(values) for values in row.scores.values()) for row in rows)
    axes.set_xlim(max(0, low - 5), 100)
    axes.set_xlabel("held-out accuracy, % (bar: average over tasks; marks: the tasks)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(tasks), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
