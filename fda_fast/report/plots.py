"""The one style of all plots, and their way into a page as SVG that follows its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from fda_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders that matplotlib draws with; the page's own colours take their place, so that a plot
# follows a dark or a light scheme.
INK, MUTED, ACCENT, LINE, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    ACCENT: "var(--accent)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
}
SIZE = (4.2, 2.9)
"""Inches: near the width of a phone, so that text keeps its size there."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def require_matplotlib() -> None:
    """Refuse to begin without matplotlib, which is optional."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "reports need matplotlib, which is not installed",
            fix="pip install 'fda-fast[plots]'",
        ) from None


@contextmanager
def drawing(size: tuple[float, float] = SIZE) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one set of axes in the page's style."""
    import matplotlib
    from matplotlib.figure import Figure as New

    with matplotlib.rc_context(_STYLE):
        figure = New(figsize=size, layout="constrained")
        yield figure, figure.add_subplot()


def svg(figure: Figure, name: str, description: str) -> str:
    """A figure as inline SVG: scales with the page, takes its colours and font, and is described.

    Args:
        figure: drawn with the placeholder colours.
        name: unique in the page; its ids begin with it.
        description: what a reader who cannot see it should know.
    """
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for placeholder, colour in _COLOURS.items():
        text = text.replace(placeholder, colour)
    # The page's font in the sizes drawn with.
    text = re.sub(r"font: (?:[\w.]+ )?([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    head = re.match(r"<svg[^>]*>", text)
    assert head is not None
    box = re.search(r'viewBox="[^"]+"', head[0])
    assert box is not None
    label = escape(description, quote=True)
    begin = f'<svg {box[0]} role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg"'
    begin += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    return begin + text[head.end() :]


def steps_axis(axes: Axes, label: str = "step") -> None:
    """A logarithmic axis that shows step 0 too."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    from matplotlib.ticker import FixedLocator, FuncFormatter

    last = axes.dataLim.x1
    powers = [10.0**power for power in range(6) if 2 * 10**power <= last]
    axes.xaxis.set_major_locator(FixedLocator([0.0, *powers, last]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(_no_ticks())


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def legend(axes: Axes, **options: Any) -> None:
    """A legend above the axes, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=options.pop("ncols", 3 if max(map(len, labels)) < 18 else 2),
            borderaxespad=0.2,
            columnspacing=1.2,
            **options,
        )
