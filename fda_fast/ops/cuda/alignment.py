"""Alignment of gradients with task vectors in CUDA C++; see fda_fast.ops.alignment."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops.alignment import Term
from fda_fast.ops.cuda.call import DTYPES, address, launch, rows_of, strided
from fda_fast.ops.memory import empty, empty_like

# csrc/launchers.cuh: kMaxSegments, kMaxTerms; csrc/alignment.cu: kChunkElements.
MOST_SEGMENTS = 16
MOST_TERMS = 128
_CHUNK = 32768

# One parameter's sums in the order of csrc/launchers.cuh, struct Term.
_Term = tuple[int | None, ...]


def _segments(widths: Sequence[int], columns: int) -> list[int]:
    if not 1 <= len(widths) <= MOST_SEGMENTS or sum(widths) != columns or min(widths) < 0:
        raise InputError(
            "widths",
            expected=f"1 to {MOST_SEGMENTS} segments of {columns} columns in all",
            got=[*widths],
        )
    return [*widths]


def _terms(term: Term, tasks: int, like: Tensor) -> list[_Term]:
    """The sums of the segments that have a parameter; dtype and device are those of ``like``."""
    g, T, G, widths, where = term
    shape = tasks, rows, columns = (tasks, *g.shape[1:])
    spans = _segments(widths, columns)
    places = [rows_of(name, x, shape, like) for name, x in (("g", g), ("T", T), ("G", G))]
    addresses, strides = zip(*places, strict=True)
    starts = itertools.accumulate(spans, initial=0)
    return [
        (*addresses, start, rows, width, columns, *strides, p)
        for start, width, p in zip(starts, spans, where, strict=False)
        if p is not None
    ]


def _partial(terms: list[_Term], tasks: int, like: Tensor) -> Tensor:
    """Scratch [2, K, chunks] of the first pass."""
    chunks = sum(-(-rows * width // _CHUNK) for *_, rows, width, _, _, _, _, _ in terms)
    return empty((2, tasks, chunks), like, torch.float32)


def dots(g: Tensor, u: Tensor, v: Tensor, widths: Sequence[int]) -> Tensor:
    """See fda_fast.ops.alignment.dots; float32 whatever the storage of g."""
    tasks, segments = g.shape[0], len(widths)
    terms = _terms(Term(g, u, v, widths, range(segments)), tasks, g)
    partial, out = _partial(terms, tasks, g), empty((2, tasks, segments), g, torch.float32)
    launch(
        "alignment_dots", g, DTYPES[g.dtype], tasks, segments, terms,
        partial.data_ptr(), partial.shape[2], out.data_ptr(),
    )  # fmt: skip
    return out


def evaluate(
    terms: Sequence[Term], squares: Tensor, active: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See fda_fast.ops.alignment.evaluate; two launches, one more for every 32 further terms.

    Args:
        terms: of at most ``MOST_TERMS`` segments in all.
    """
    first = terms[0].g
    tasks, parameters = squares.shape
    found = [one for term in terms for one in _terms(term, tasks, first)]
    squares, active = squares.float().contiguous(), active.contiguous()
    partial = _partial(found, tasks, first)
    sums, out = (empty((2, tasks, parameters), first, torch.float32) for _ in range(2))
    loss, cosines = empty((tasks,), out), empty((tasks, parameters), out)
    launch(
        "alignment_evaluate", first, DTYPES[first.dtype], tasks, parameters, found,
        partial.data_ptr(), partial.shape[2], sums.data_ptr(),
        address("squares", squares, (tasks, parameters), out),
        address("active", active, (parameters,), out, torch.bool), eps,
        loss.data_ptr(), cosines.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return loss, cosines, out


def mix(
    alpha: Tensor, u: Tensor, beta: Tensor, v: Tensor, widths: Sequence[int], row: Tensor | None
) -> Tensor:
    """See fda_fast.ops.alignment.mix."""
    tasks, rows, columns = u.shape
    spans = _segments(widths, columns)
    shape = (tasks, len(spans))
    # By name: a copy must live until the launch, or the next copy takes its memory.
    alpha, beta = alpha.float(), beta.float()
    out = empty_like(u)
    launch(
        "alignment_mix", u, DTYPES[u.dtype], tasks, rows, columns, spans,
        strided("alpha", alpha, shape, u), address("u", u, u.shape, u),
        strided("beta", beta, shape, u), address("v", v, u.shape, u),
        address("row", row, (tasks, columns), u), out.data_ptr(),
    )  # fmt: skip
    return out


def coefficients(
    dots: Tensor, squares: Tensor, active: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See fda_fast.ops.alignment.coefficients."""
    _, tasks, terms = dots.shape
    dots, squares = dots.float().contiguous(), squares.float().contiguous()
    active = active.contiguous()
    loss, cosines, out = empty((tasks,), dots), empty((tasks, terms), dots), empty_like(dots)
    launch(
        "alignment_coefficients", dots, tasks, terms,
        address("dots", dots, (2, tasks, terms), dots),
        address("squares", squares, (tasks, terms), dots),
        address("active", active, (terms,), dots, torch.bool), eps,
        loss.data_ptr(), cosines.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return loss, cosines, out
