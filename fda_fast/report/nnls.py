"""Least squares with coefficients that must not be negative."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.errors import InputError


def nnls(gram: Tensor, products: Tensor, *, tolerance: float = 1e-12) -> Tensor:
    """argmin over a >= 0 of |t - A a|^2, given A^T A and A^T t: A itself may be huge.

    The active-set method of Lawson and Hanson (1974, chapter 23): exact in finitely many steps.

    Args:
        gram: A^T A, [m, m], symmetric positive semi-definite; float64.
        products: A^T t, [m].
        tolerance: a coefficient joins if its gradient is above this share of the largest product.

    Returns:
        [m], float64, not negative.

    Raises:
        InputError: shapes that do not fit, or values that are not finite.

    Cost: about one solve of at most m unknowns for every positive coefficient.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or products.shape != gram.shape[:1]:
        raise InputError(
            "nnls", expected="[m, m] and [m]", got=f"{list(gram.shape)}, {list(products.shape)}"
        )
    if not bool(torch.isfinite(gram).all() and torch.isfinite(products).all()):
        raise InputError("nnls", expected="finite values", got="NaN or infinity")
    gram, products = gram.double(), products.double()
    # Columns of length one: the same cone, and one tolerance for all of them.
    length = gram.diagonal().clamp_min(0).sqrt()
    used = length > 0
    scale = torch.where(used, 1 / length, 0.0)
    gram, products = gram * scale[:, None] * scale, products * scale
    solution = torch.zeros_like(products)
    if not bool((products > 0).any()):
        return solution
    floor = tolerance * products.abs().max()
    passive = torch.zeros_like(used)
    for _ in range(3 * len(products) + 10):
        gradient = products - gram @ solution
        gradient[passive | ~used] = -torch.inf
        joining = int(gradient.argmax())
        if gradient[joining] <= floor:
            break
        passive[joining] = True
        while True:
            trial = _solve(gram, products, passive)
            blocking = passive & (trial <= 0)
            if not bool(blocking.any()):
                solution = trial
                break
            if bool(blocking[joining]) and solution[joining] == 0:
                # Dependent on the columns already in: to rounding it adds nothing.
                passive[joining], used[joining] = False, False
                continue
            ratio = solution[blocking] / (solution[blocking] - trial[blocking])
            solution = solution + ratio.min() * (trial - solution)
            passive &= solution > 1e-15 * solution.max()
            solution[~passive] = 0
    return solution * scale


def _solve(gram: Tensor, products: Tensor, passive: Tensor) -> Tensor:
    """The unconstrained solution over the passive columns, zero elsewhere."""
    index = passive.nonzero()[:, 0]
    solution = torch.zeros_like(products)
    if len(index):
        block = gram[index][:, index]
        solution[index] = torch.linalg.lstsq(block, products[index][:, None]).solution[:, 0]
    return solution
