"""Alignment of the gradients G_p of s with the task vectors T_p.

    L = sum_p (1 - cos_p),  cos_p = <G_p, T_p> / (|G_p| |T_p|)
    M_p = dL / dG_p = alpha_p T_p + beta_p G_p

A linear layer is packed from segments, each its own parameter: segment s owns ``widths[s]`` columns
of the output. Coefficients of segments are [K, S].
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fda_fast.ops import dispatch


def dots(
    g: Tensor, u: Tensor, v: Tensor, widths: Sequence[int], *, backend: str = "auto"
) -> Tensor:
    """[2, K, S]: <g, u> and <g, v> over the rows and the columns of each segment.

    g, u, v are contiguous [K, R, o]. With g the cotangent at the output of a linear layer,
    u = x T^T and v = x G^T, these are <G, T> and |G|^2.
    """
    return dispatch.implementation("alignment", g, backend).dots(g, u, v, widths)


def mix(
    alpha: Tensor,
    u: Tensor,
    beta: Tensor,
    v: Tensor,
    widths: Sequence[int],
    row: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """alpha u + beta v + row: [K, R, o] from coefficients [K, S] and a row [K, o] or None."""
    module = dispatch.implementation("alignment", u, backend)
    return module.mix(alpha, u, beta, v, widths, row)


def coefficients(
    dots: Tensor,
    squares: Tensor,
    active: Tensor,
    eps: float = 1e-8,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cosines and the coefficients of M.

    Args:
        dots: [2, K, P], <G_p, T_p> and |G_p|^2.
        squares: [K, P], |T_p|^2.
        active: [P] bool; a term that is not active, or whose T is zero, is the constant 1.
        eps: floor of |G_p|, in the unit of the gradient; that of |T_p| is 1e-8.
        backend: "auto", "torch", "cpu", "triton" or "cuda".

    Returns:
        loss [K], cosines [K, P] (0 where the term is constant), [2, K, P] alpha and beta.

    Numerics: F.cosine_similarity's floors; like there, the floor of |G_p| counts in the value,
    not in the derivative of |G_p|:  alpha = -1 / (n t),  beta = cos / (n |G|),  n = max(|G|, eps).
    """
    module = dispatch.implementation("alignment", dots, backend)
    return module.coefficients(dots, squares, active, eps)
