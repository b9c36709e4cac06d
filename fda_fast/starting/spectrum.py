"""The parts of a singular value decomposition that merging needs, and no more.

Everything is computed in float64 whatever the input: a Gram matrix squares the condition number,
and float64 leaves float32 task vectors enough digits for that. Where it would not, a full
decomposition is taken instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 48
"""Shorter side up to which a full SVD costs nothing worth saving."""

_GRAM_CONDITION = 1e-3
"""Least kept singular value, relative to the largest, that a Gram matrix resolves: its vectors
come out to about 1e-16 / 1e-6 over the relative gap."""

_NEWTON_CONDITION = 3e-6
"""Least relative singular value with which the polar iteration may start: below, a Gram matrix in
float64 cannot tell a small singular value from none."""


def default_rtol(matrix: Tensor) -> float:
    """Relative size under which a singular value counts as zero: longer side times epsilon.

    The rule of ``numpy.linalg.matrix_rank`` and ``torch.linalg.matrix_rank``, for the precision
    the entries had: float32's also for half types, whose task vectors are formed in float32.
    """
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return max(matrix.shape[-2:]) * torch.finfo(dtype).eps


def low_rank(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors Q [m, q], B [q, n] with matrix = Q B to its own rounding, if q <= min(m, n) / 8.

    Task vectors of LoRA experts are such matrices. One random projection finds the range; the
    residual decides, so a matrix of higher rank is never cut. Cost of finding out that it is one:
    about m n min(m, n) / 4 operations in the input's precision.

    Args:
        matrix: [m, n], float32 or float64.

    Returns:
        Q with orthonormal columns and B, both float64; None if the rank is higher (or the matrix
        too small for this to be worth it).
    """
    limit = min(matrix.shape) // 8
    if min(matrix.shape) <= _SMALL:
        return None
    eps = torch.finfo(matrix.dtype).eps
    norm = torch.linalg.matrix_norm(matrix)
    # Fixed numbers, so that a merge gives the same bytes every time.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], limit + 8, generator=generator, dtype=matrix.dtype)
    images = matrix @ probe.to(matrix.device)
    basis, spare = torch.linalg.qr(images[:, :limit]).Q, images[:, limit:]
    # Cheap refusal first: eight more images must lie in the span of the others.
    outside = torch.linalg.matrix_norm(spare - basis @ (basis.T @ spare))
    if not bool(outside <= 64 * eps * torch.linalg.matrix_norm(spare)):
        return None
    wide = matrix.double()
    basis = torch.linalg.qr(wide @ (basis.T @ matrix).double().T).Q
    core = basis.T @ wide
    if not bool(torch.linalg.matrix_norm(wide - basis @ core) <= 4 * eps * norm):
        return None
    return basis, core


def leading_triplets(
    matrix: Tensor, count: int, *, rtol: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``count`` singular triplets, without those whose singular value is zero.

    Where a task vector has fewer than ``count`` nonzero singular values the vectors of a full SVD
    beyond its rank are arbitrary; they are left out here.

    Args:
        matrix: [m, n], finite, float32 or float64.
        count: how many at most.
        rtol: singular values up to rtol times the largest count as zero; ``default_rtol`` if None.

    Returns:
        U [m, k], s [k] descending, V [n, k], float64, k <= count; matrix ~ U diag(s) V^T.

    Cost: m n min(m, n) operations for the Gram matrix and its eigenvectors, against some 20 times
    that for the SVD.
    """
    rtol = default_rtol(matrix) if rtol is None else rtol
    factors = low_rank(matrix)
    if factors is not None:
        basis, core = factors
        u, s, v = _svd(core, count, rtol)
        return basis @ u, s, v
    if min(matrix.shape) <= _SMALL:
        return _svd(matrix.double(), count, rtol)
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = _gram_triplets(matrix.T, count, rtol)
    else:
        u, s, v = _gram_triplets(matrix, count, rtol)
    return u, s, v


def _gram_triplets(matrix: Tensor, count: int, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of a matrix [m, n] with m <= n, through matrix matrix^T [m, m]."""
    wide = matrix.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    s = values.flip(0)[:count].clamp_min(0).sqrt()
    kept = _kept(s, rtol)
    if kept and bool(s[kept - 1] < _GRAM_CONDITION * s[0]):
        return _svd(wide, count, rtol)
    u, s = vectors.flip(1)[:, :kept], s[:kept]
    return u, s, (wide.T @ u) / s


def _svd(matrix: Tensor, count: int, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = _kept(s[:count], rtol)
    return u[:, :kept], s[:kept], vt[:kept].T


def _kept(s: Tensor, rtol: float) -> int:
    if not s.numel() or not bool(s[0] > 0):
        return 0
    return int((s > rtol * s[0]).sum())


def polar_factor(matrix: Tensor, *, rtol: float = 1e-6) -> Tensor:
    """Nearest partial isometry: P Q^T of the thin SVD P diag(d) Q^T, without null directions.

    Directions whose d is at most ``rtol`` times the largest are left out: the factor of a full
    SVD pairs arbitrary vectors there.

    Args:
        matrix: [m, q], float64.
        rtol: where d counts as zero.

    Returns:
        [m, q] float64, with orthonormal columns if the rank is q <= m.
    """
    if matrix.shape[1] > matrix.shape[0]:
        return polar_factor(matrix.T, rtol=rtol).T
    if not matrix.numel():
        return matrix
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    least = float((values[0] / values[-1]).clamp_min(0)) ** 0.5
    if least > 1e-4:
        return matrix @ ((vectors / values.sqrt()) @ vectors.T)
    if least > max(rtol, _NEWTON_CONDITION):
        if matrix.shape[0] == matrix.shape[1]:
            return _newton_polar(matrix)
        q, r = torch.linalg.qr(matrix)
        return q @ _newton_polar(r)
    u, d, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = _kept(d, rtol)
    return u[:, :kept] @ vt[:kept]


def _newton_polar(matrix: Tensor) -> Tensor:
    """Scaled Newton iteration X <- (g X + X^-T / g) / 2 for a nonsingular square matrix.

    Accurate where a Gram matrix is not, as it never squares the condition number. Source: Higham,
    "Computing the polar decomposition", SIAM J. Sci. Stat. Comput. 7 (1986), with its scaling g.
    """
    norms = torch.linalg.matrix_norm
    for _ in range(40):
        inverse = torch.linalg.inv(matrix)
        ratio = (norms(inverse, 1) * norms(inverse, torch.inf)) / (
            norms(matrix, 1) * norms(matrix, torch.inf)
        )
        scale = ratio**0.25
        step = (matrix * scale + inverse.T / scale) / 2
        change = norms(step - matrix) / norms(step)
        matrix = step
        # Convergence is quadratic: the step after a change of 1e-8 is exact.
        if bool(change < 1e-8):
            break
    return matrix
