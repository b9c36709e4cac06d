"""Figures of the committed results: docs/quality.png and docs/ablations.png.

python benchmarks/quality/figures.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import neighbours
from common import RESULTS
from tables import averages, find, name_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FDA, PLAIN, BOUND, DATA = "#c8553d", "#588b8b", "#9aa5b1", "#c9a227"
TITLES = {
    "steps": "construction steps",
    "anchors": "anchors per task",
    "tokens": "tokens per anchor",
    "sigma": "sigma of Gaussian anchors",
    "distance": "distance: construction, adaptation",
    "precision": "engine and precision",
    "optimiser": "optimiser of construction",
    "patience": "early stop: patience, tolerance",
    "sign": "sign of the objective",
}


def load(name: str) -> list[dict[str, Any]]:
    """The result files of that name, one per machine."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def quality(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of every method's average accuracy, one panel a suite."""
    figure, panels = plt.subplots(
        1, len(results), figsize=(6.2 * len(results), 5.6), layout="constrained", squeeze=False
    )
    for axes, result in zip(panels[0], results, strict=True):
        rows = [row for row in result["rows"] if row.get("which", "tuned") == "tuned"]
        experts = statistics.fmean(averages(find(result, "individual experts")))
        base = statistics.fmean(averages(find(result, "pretrained")))
        for y, row in enumerate(rows):
            values = averages(row)
            colour = FDA if row["method"].startswith("FDA") else PLAIN
            colour = DATA if row.get("init") == "real" else colour
            colour = BOUND if row["method"] in ("pretrained", "individual experts") else colour
            error = statistics.stdev(values) if len(values) > 1 else None
            mean = statistics.fmean(values)
            axes.barh(y, mean, xerr=error, color=colour, height=0.7)
            axes.text(mean, y, f" {mean:.1f}", va="center", fontsize=8)
        axes.axvline(base, color="#22303c", lw=0.8, ls=":")
        axes.set_yticks(range(len(rows)), [name_of(row) for row in rows], fontsize=8)
        axes.invert_yaxis()
        lowest = min(min(averages(row)) for row in rows)
        axes.set_xlim(lowest - 4, experts + 3)
        axes.set_title(f"{result['suite']} suite, {len(result['tasks'])} tasks", fontsize=10)
        axes.set_xlabel("average held-out accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def ablations(results: list[dict[str, Any]], path: Path) -> None:
    """One panel an ablation: accuracy after FDA from the pretrained model and from TA."""
    columns = 3
    lines = -(-len(results) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(12, 2.9 * lines), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(results) :]:
        axes.remove()
    for axes, result in zip(panels.flat, results, strict=False):
        labels = [row["label"] for row in result["rows"]]
        places = range(len(labels))
        for start, label, colour, mark in (
            ("pretrained", "from pretrained", FDA, "o"),
            ("task_arithmetic", "from Task Arithmetic", PLAIN, "s"),
        ):
            values = [row[start] for row in result["rows"]]
            error = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            axes.errorbar(places, [statistics.fmean(v) for v in values], yerr=error, fmt=mark,
                          color=colour, ms=4, capsize=2, label=label)  # fmt: skip
        axes.set_xticks(places, labels, rotation=40, ha="right", fontsize=7)
        axes.set_title(TITLES[result["ablation"]], fontsize=9)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", lw=0.3)
    panels[0][0].set_ylabel("average accuracy, %", fontsize=8)
    panels[0][0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=neighbours.ROOT / "docs")
    folder = parser.parse_args().folder
    suites = [one for name in ("vision", "vision-joint", "text") for one in load(f"quality-{name}")]
    if suites:
        quality(suites, folder / "quality.png")
    found = [one for name in TITLES for one in load(f"quality-ablate-{name}")]
    if found:
        ablations(found, folder / "ablations.png")


if __name__ == "__main__":
    main()
