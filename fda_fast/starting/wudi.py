"""WUDI: descend the interference between the merged task vector and every task's subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.starting.deltas import Deltas, as_matrices
from fda_fast.starting.spectrum import low_rank

_STRIP = 512
"""Rows of A formed at a time: wide enough for full speed, narrow enough to use the symmetry."""


def wudi(deltas: Deltas, *, steps: int = 300, lr: float = 1e-5) -> Tensor:
    """Merge the task vectors of one matrix by WUDI.

    From tau = sum_i tau_i, ``steps`` Adam steps on

        L(tau) = sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2

    L is quadratic. With D = tau - sum_i tau_i, the only thing that moves, its gradient is

        2 (D A + C),   A = sum_i tau_i^T tau_i / |tau_i|^2,   C = sum_i (sum_{j != i} tau_j)
                                                                  tau_i^T tau_i / |tau_i|^2

    A and C are formed once, so a step is one product and one fused Adam pass. C is a sum over the
    *other* tasks rather than a difference of large terms; so where no task interferes the gradient
    is exactly zero, and no rounding noise for Adam to amplify. The trajectory is the published
    one: 300 steps, not run to convergence.

    A task vector that is all zero has no subspace and is left out (published: 0 / 0).

    Args:
        deltas: K matrices [o, i], as a tensor [K, o, i] or a sequence.
        steps: Adam steps.
        lr: learning rate; 1e-5 published for vision, 2e-5 for RoBERTa.

    Returns:
        [o, i] float32 (float64 if the task vectors are), the merged task vector, unscaled.

    Raises:
        InputError: no task vector, shapes differ, not matrices, NaN or infinity, steps below 0.

    Cost: 2 o i^2 operations a step, or 4 o i q where the task vectors' ranks sum to q < i / 2.
    Memory: i^2 (or i q) and about seven times o i elements beside the task vectors.
    Source: Cheng et al., arXiv 2503.08099; as coded in the official main_wudi.py.
    """
    matrices = as_matrices(deltas)
    if steps < 0:
        raise InputError("WUDI steps", expected="0 or more", got=steps)
    dtype = matrices[0].dtype
    total = torch.zeros_like(matrices[0], dtype=torch.float64)
    for matrix in matrices:
        total += matrix
    matrices = [matrix for matrix in matrices if bool(matrix.any())]
    if len(matrices) < 2 or steps == 0:
        return total.to(dtype)
    constant = _interference(matrices, total)
    product = _projection(matrices)
    return total.add_(_descend(constant, product, steps, lr)).to(dtype)


def _interference(matrices: list[Tensor], total: Tensor) -> Tensor:
    """2 C [o, i], the gradient at the start."""
    constant = torch.zeros_like(total)
    for matrix in matrices:
        wide = matrix.double()
        others = total - wide
        factor = 2 / float(torch.linalg.matrix_norm(wide)) ** 2
        if wide.shape[0] <= wide.shape[1]:
            constant.addmm_(others @ wide.T, wide, alpha=factor)
        else:
            constant.addmm_(others, wide.T @ wide, alpha=factor)
    return constant.to(matrices[0].dtype)


def _projection(matrices: list[Tensor]) -> tuple[Tensor, ...]:
    """2 A as one matrix [i, i], or as factors F^T [i, q], F [q, i] if that is less work."""
    rows: list[Tensor] = []
    for matrix in matrices:
        rows.append(_row_factor(matrix))
        if 2 * sum(factor.shape[0] for factor in rows) > matrix.shape[1]:
            return (_gram_sum(matrices),)
    factor = torch.cat(rows)
    return factor.T.contiguous(), factor


def _gram_sum(matrices: list[Tensor]) -> Tensor:
    """sum_i 2 tau_i^T tau_i / |tau_i|^2 [i, i], accumulated in float64.

    The step's own rounding differs every time and averages out; that of A would push the same
    way 300 times (measured: 3e-6 of the result instead of 6e-7). Symmetric, so only strips
    right of the diagonal are computed.
    """
    first = matrices[0]
    width = first.shape[1]
    norms = [float(torch.linalg.matrix_norm(matrix, dtype=torch.float64)) for matrix in matrices]
    square = torch.empty(width, width, dtype=first.dtype, device=first.device)
    for start in range(0, width, _STRIP):
        height = min(_STRIP, width - start)
        strip = torch.zeros(height, width - start, dtype=torch.float64, device=first.device)
        for matrix, norm in zip(matrices, norms, strict=True):
            columns = matrix[:, start:].double()
            strip.addmm_(columns[:, :height].T, columns, alpha=2 / norm**2)
        square[start : start + height, start:] = strip
        square[start:, start : start + height] = strip.T
    return square


def _row_factor(matrix: Tensor) -> Tensor:
    """F [q, i] with F^T F = 2 tau^T tau / |tau|^2, q the rank if low, else the number of rows."""
    factors = low_rank(matrix)
    if factors is None:
        return matrix * (2**0.5 / torch.linalg.matrix_norm(matrix))
    # Q is orthonormal, so tau^T tau = B^T B; its SVD drops the rows beyond the rank.
    _, s, vt = torch.linalg.svd(factors[1], full_matrices=False)
    kept = s > torch.finfo(matrix.dtype).eps * s[0]
    scaled = (s[kept] * (2**0.5 / torch.linalg.vector_norm(s)))[:, None] * vt[kept]
    return scaled.to(matrix.dtype)


def _descend(constant: Tensor, product: tuple[Tensor, ...], steps: int, lr: float) -> Tensor:
    """D after ``steps`` of Adam on the gradient D A + C, in place."""
    moved = torch.zeros_like(constant)
    gradient = torch.empty_like(constant)
    moved.grad = gradient
    optimiser = torch.optim.Adam([moved], lr=lr, fused=constant.device.type in ("cpu", "cuda"))
    for _ in range(steps):
        left = moved if len(product) == 1 else moved @ product[0]
        torch.addmm(constant, left, product[-1], out=gradient)
        optimiser.step()
    return moved
