"""Alignment of the gradients G_p of s with the task vectors T_p.

    L = sum_p (1 - cos_p),  cos_p = <G_p, T_p> / (|G_p| |T_p|)
    M_p = dL / dG_p = alpha_p T_p + beta_p G_p

A linear layer is packed from segments, each its own parameter: segment s owns ``widths[s]`` columns
of the output. Coefficients of segments are [K, S].
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops import dispatch


class Term(NamedTuple):
    """What ``evaluate`` sums for some parameters: <g, T> is <G_p, T_p>, and <g, G> is |G_p|^2.

    Not of G and T themselves where other tensors have the same products; both sums of a parameter
    need not come from one term.

    Attributes:
        g: [K, R, o], each task without gaps.
        T: likewise, or None where <G_p, T_p> is not meant.
        G: likewise, or None where |G_p|^2 is not meant.
        widths: columns of each segment; o in all.
        where: number p of each segment's parameter, or None for a segment that has none.
    """

    g: Tensor
    T: Tensor | None
    G: Tensor | None
    widths: Sequence[int]
    where: Sequence[int | None]


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


def evaluate(
    terms: Sequence[Term],
    squares: Tensor,
    active: Tensor,
    eps: float = 1e-8,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``dots`` of all parameters of a layer, then ``coefficients``: one call for a layer.

    Args:
        terms: each of the P parameters once as <G_p, T_p> and once as |G_p|^2.
        squares, active, eps, backend: as in ``coefficients``.

    Returns:
        loss [K], cosines [K, P], [2, K, P] alpha and beta.

    Raises:
        InputError: a sum is missing or there twice; shapes, dtypes or devices differ.

    Cost: on the "cuda" backend two launches for a layer of 32 segments, one more for every further
    32 up to 128; on the others, and beyond, what the single calls cost.
    """
    module = dispatch.implementation("alignment", terms[0].g, backend)
    _check_complete(terms, squares.shape[1])
    if sum(len(term.where) for term in terms) > getattr(module, "MOST_TERMS", 0):
        return _one_by_one(module, terms, squares, active, eps)
    found: tuple[Tensor, Tensor, Tensor] = module.evaluate(terms, squares, active, eps)
    return found


def _check_complete(terms: Sequence[Term], parameters: int) -> None:
    for name in ("T", "G"):
        given = [p for t in terms if getattr(t, name) is not None for p in t.where if p is not None]
        if sorted(given) != [*range(parameters)]:
            raise InputError(
                f"terms with {name}", expected=f"one of each of {parameters} parameters", got=given
            )


def _one_by_one(
    module: ModuleType, terms: Sequence[Term], squares: Tensor, active: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    planes: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})  # [K, n] from a column on
    for g, T, G, widths, where in terms:
        u, v = T if T is not None else G, G if G is not None else T
        assert u is not None and v is not None, "a term without a sum"
        dense = {id(x): x.contiguous() for x in (g, u, v)}
        sums = module.dots(dense[id(g)], dense[id(u)], dense[id(v)], widths)
        for plane, found, wanted in zip(planes, sums, (T, G), strict=True):
            if wanted is not None:
                plane.update(_columns(found, where))
    dots = torch.stack([torch.cat([plane[p] for p in sorted(plane)], 1) for plane in planes])
    out: tuple[Tensor, Tensor, Tensor] = module.coefficients(dots, squares, active, eps)
    return out


def _columns(found: Tensor, where: Sequence[int | None]) -> dict[int, Tensor]:
    """Sums [K, S] of segments by their parameter; several in a row stay together."""
    first = where[0]
    if first is not None and [*where] == [*range(first, first + len(where))]:
        return {first: found}
    return {p: found[:, s : s + 1] for s, p in enumerate(where) if p is not None}
