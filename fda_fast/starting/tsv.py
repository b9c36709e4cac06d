"""TSV-M: merge the leading singular vectors of the task vectors, orthogonalised across tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.starting.deltas import Deltas, as_matrices
from fda_fast.starting.spectrum import default_rtol, leading_triplets, polar_factor


def tsv(deltas: Deltas, *, count: int | None = None, rtol: float | None = None) -> Tensor:
    """Merge the task vectors of one matrix by Task Singular Vectors.

    With tau_i = U_i diag(s_i) V_i^T cut to its first k triplets, U = [U_1 .. U_K] and likewise s
    and V, and the polar factors U* of U and V* of V (P Q^T of a thin SVD P D Q^T):

        tau = U* diag(s) V*^T

    Two cases leave the published procedure undefined, because a full SVD returns arbitrary vectors
    there, and are defined here. A task vector of rank below k (LoRA) contributes only as many
    triplets as it has nonzero singular values. Where the columns of U (or V) are linearly
    dependent, as for two equal experts, the polar factor is the partial isometry without null
    directions. So one task, or K equal ones, give back their own leading part.

    Args:
        deltas: K matrices [o, i], as a tensor [K, o, i] or a sequence.
        count: k; default min(o, i) // K, the method's definition. (The published script divides
            by 8, its number of tasks.)
        rtol: singular values up to rtol times the task's largest count as zero; default
            max(o, i) * epsilon of the input's precision.

    Returns:
        [o, i] float32 (float64 if the task vectors are), the merged task vector, unscaled.

    Raises:
        InputError: no task vector, shapes differ, not matrices, NaN or infinity, or k below 1.

    Cost: per task a Gram matrix of the shorter side and its eigenvectors, instead of a full SVD.
    Source: Gargiulo et al., arXiv 2412.00081; as coded in the official main_tsvm.py.
    """
    matrices = as_matrices(deltas)
    shape, dtype = matrices[0].shape, matrices[0].dtype
    if count is None:
        # More tasks than rows or columns: one triplet each, the least that keeps every task.
        count = max(1, min(shape) // len(matrices))
    if count < 1:
        raise InputError("count of singular vectors", expected="at least 1", got=count)
    if not min(shape):
        return torch.zeros(shape, dtype=dtype, device=matrices[0].device)
    rtol = default_rtol(matrices[0]) if rtol is None else rtol
    parts = [leading_triplets(matrix, count, rtol=rtol) for matrix in matrices]
    left, values, right = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    # Directions float32 task vectors do not determine; float64 ones do to 1e-12.
    dependent = 1e-6 if dtype == torch.float32 else 1e-12
    left = polar_factor(left, rtol=dependent) * values
    return (left @ polar_factor(right, rtol=dependent).T).to(dtype)
