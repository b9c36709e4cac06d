"""Alignment of gradients with task vectors in C++; see fda_fast.ops.alignment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops.memory import empty, empty_like
from fda_fast.ops.native.call import address, library, threads

# kDotRows of csrc/cpu/alignment.h.
_GROUP_ROWS = 16


def _segments(widths: Sequence[int], columns: int) -> Tensor:
    if sum(widths) != columns or min(widths, default=0) < 0:
        raise InputError("widths", expected=f"{columns} columns in all", got=[*widths])
    return torch.tensor(widths, dtype=torch.int64)


def dots(g: Tensor, u: Tensor, v: Tensor, widths: Sequence[int]) -> Tensor:
    """See fda_fast.ops.alignment.dots."""
    tasks, rows, columns = g.shape
    spans = _segments(widths, columns)
    out = empty((2, tasks, len(widths)), g)
    groups = -(-rows // _GROUP_ROWS)
    partial = empty((tasks, groups, 2, len(widths)), g, torch.float64)
    library().alignment_dots(
        tasks, rows, columns, len(widths), spans.data_ptr(), address("g", g, g.shape),
        address("u", u, g.shape), address("v", v, g.shape), partial.data_ptr(), out.data_ptr(),
        threads(),
    )  # fmt: skip
    return out


def mix(
    alpha: Tensor, u: Tensor, beta: Tensor, v: Tensor, widths: Sequence[int], row: Tensor | None
) -> Tensor:
    """See fda_fast.ops.alignment.mix."""
    tasks, rows, columns = u.shape
    spans = _segments(widths, columns)
    shape = (tasks, len(widths))
    out = empty_like(u)
    alpha, beta = alpha.contiguous(), beta.contiguous()
    library().alignment_mix(
        tasks, rows, columns, len(widths), spans.data_ptr(), address("alpha", alpha, shape),
        address("u", u, u.shape), address("beta", beta, shape), address("v", v, u.shape),
        address("row", row, (tasks, columns)), out.data_ptr(), threads(),
    )  # fmt: skip
    return out


def coefficients(
    dots: Tensor, squares: Tensor, active: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See fda_fast.ops.alignment.coefficients."""
    _, tasks, parameters = dots.shape
    dots, squares, active = dots.contiguous(), squares.contiguous(), active.contiguous()
    if active.dtype != torch.bool or active.shape != (parameters,):
        raise InputError("active", expected=f"[{parameters}] bool", got=f"{active.dtype}")
    loss = empty((tasks,), dots)
    cosines = empty((tasks, parameters), dots)
    out = empty(dots.shape, dots)
    library().alignment_coefficients(
        tasks, parameters, address("dots", dots, (2, tasks, parameters)),
        address("squares", squares, (tasks, parameters)), active.data_ptr(), eps,
        loss.data_ptr(), cosines.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return loss, cosines, out
