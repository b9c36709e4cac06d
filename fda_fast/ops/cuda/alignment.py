"""Alignment of gradients with task vectors in CUDA C++; see fda_fast.ops.alignment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast import _native
from fda_fast.errors import InputError
from fda_fast.ops.cuda.call import DTYPES, address, launch, strided
from fda_fast.ops.memory import empty, empty_like

# csrc/launchers.cuh, kMaxSegments.
MOST_SEGMENTS = 16


def _segments(widths: Sequence[int], columns: int) -> list[int]:
    if not 1 <= len(widths) <= MOST_SEGMENTS or sum(widths) != columns or min(widths) < 0:
        raise InputError(
            "widths",
            expected=f"1 to {MOST_SEGMENTS} segments of {columns} columns in all",
            got=[*widths],
        )
    return [*widths]


def dots(g: Tensor, u: Tensor, v: Tensor, widths: Sequence[int]) -> Tensor:
    """See fda_fast.ops.alignment.dots; float32 whatever the storage of g."""
    tasks, rows, columns = g.shape
    spans = _segments(widths, columns)
    out = empty((2, tasks, len(spans)), g, torch.float32)
    chunks = _native.load().cuda_alignment_chunks(rows, spans)
    partial = empty((2, tasks, len(spans), chunks), g, torch.float32)
    launch(
        "alignment_dots", g, DTYPES[g.dtype], tasks, rows, columns, spans,
        address("g", g, g.shape, g), address("u", u, g.shape, g), address("v", v, g.shape, g),
        partial.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


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
