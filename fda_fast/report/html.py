"""Pieces of HTML: tables that scroll in their own box, heat maps, tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = ()
) -> str:
    """A table: the first column names the rows, the others hold numbers.

    Args:
        caption: what it shows.
        head: of the columns.
        rows: cells; anything that may hold a user's text is escaped here.
        text: columns that hold text.
    """
    body = []
    for row in rows:
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        for index, cell in enumerate(row[1:], 1):
            kind = ' class="text"' if index in text else ""
            cells.append(f"<td{kind}>{escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return _boxed(caption, head, body, text)


def heat_map(
    caption: str,
    head: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    *,
    digits: int = 2,
    totals: bool = True,
) -> str:
    """A table of numbers on a ground that is the stronger, the greater the number in this table.

    Args:
        caption: what it shows.
        head: of the columns of numbers.
        rows: numbers by the row's name; None is an empty cell.
        digits: behind the point.
        totals: add the mean of every row, and of every column.
    """
    head = ["layer", *head]
    body = []
    lines = {name: list(values) for name, values in rows.items()}
    if totals:
        head.append("mean")
        columns = list(zip(*lines.values(), strict=True))
        lines = {name: [*values, mean(values)] for name, values in lines.items()}
        if len(lines) > 1:
            every = [value for values in columns for value in values]
            lines["mean"] = [*(mean(values) for values in columns), mean(every)]
    there = [value for values in rows.values() for value in values if value is not None]
    low, high = min(there, default=0.0), max(there, default=1.0)
    for name, values in lines.items():
        cells = [f'<th scope="row">{escape(name)}</th>']
        for index, value in enumerate(values):
            total = totals and (index == len(values) - 1 or (name == "mean" and len(lines) > 1))
            if value is None:
                cells.append("<td>–</td>")
            elif total:
                cells.append(f'<td class="total">{value:.{digits}f}</td>')
            else:
                shade = 0.1 + 0.9 * (value - low) / (high - low) if high > low else 0.5
                cells.append(f'<td class="heat" style="--v:{shade:.3f}">{value:.{digits}f}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return _boxed(caption, head, body)


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there; None if nothing is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def tiles(found: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: (label, value, remark)."""
    cells = []
    for label, value, remark in found:
        small = f"<small>{escape(remark)}</small>" if remark else ""
        cells.append(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}{small}</dd></div>")
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def section(title: str, lead: str, *parts: str) -> str:
    """A section of the page; nothing if no part has content."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return ""
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{lead}</p>\n{content}\n</section>"


def grid(*figures: str) -> str:
    """Figures side by side where there is room."""
    found = [figure for figure in figures if figure]
    pairs = " pairs" if len(found) in (2, 4) else ""
    return f'<div class="grid{pairs}">{"".join(found)}</div>' if found else ""


def folded(summary: str, content: str) -> str:
    """Content that opens on demand, without a script."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def _boxed(caption: str, head: Sequence[str], body: Sequence[str], text: Sequence[int] = ()) -> str:
    cells = []
    for index, name in enumerate(head):
        left = ' style="text-align:left"' if index in text else ""
        cells.append(f'<th scope="col"{left}>{escape(name)}</th>')
    # A box that scrolls must be reachable by keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption, quote=True)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{''.join(cells)}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
