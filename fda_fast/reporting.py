"""The table printed when a merge is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fda_fast.progress import clock

if TYPE_CHECKING:
    from fda_fast.merge import Report


def table(report: Report) -> Group:
    """What a person wants to know at the end, for a rich console.

    Per layer the mean over tasks of the alignment loss and of the mean cosine, and the adaptation
    loss of the first and the last epoch; then where the time went.
    """
    parts: list[Table | Text] = []
    if any(layer.tasks for layer in report.layers):
        parts.append(_layers(report))
    spent = "  ".join(
        f"{phase} {clock(seconds)}" for phase, seconds in report.seconds.items() if seconds >= 1
    )
    parts.append(Text(f"written: {report.output}" + (f"   ({spent})" if spent else "")))
    return Group(*parts)


def _layers(report: Report) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("layer")
    for heading in ("alignment loss", "mean cosine", "adaptation loss", "seconds"):
        shown.add_column(heading, justify="right")
    for layer in report.layers:
        tasks = list(layer.tasks.values())
        loss = sum(task.loss for task in tasks) / max(1, len(tasks))
        cosine = sum(task.mean_cosine for task in tasks) / max(1, len(tasks))
        fitted = "-"
        if layer.adaptation is not None:
            first, last = layer.adaptation
            fitted = f"{first:.4g} -> {last:.4g}"
        seconds = f"{sum(layer.seconds.values()):.1f}" if layer.seconds else "earlier"
        shown.add_row(layer.layer, f"{loss:.4f}", f"{cosine:.3f}", fitted, seconds)
    return shown
