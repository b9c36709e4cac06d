"""Adaptation of elementwise coefficients in C++; see fda_fast.ops.coefficients."""

from __future__ import annotations

from torch import Tensor

from fda_fast.ops.native.adamw import scalars
from fda_fast.ops.native.call import address, library, threads


def update_(
    alpha: Tensor,
    tau: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    delta: Tensor,
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """See fda_fast.ops.coefficients.update_."""
    shape = alpha.shape
    library().coefficients_update(
        shape[0], grad.numel(), address("alpha", alpha, shape), address("tau", tau, shape),
        address("grad", grad, shape[1:]), address("exp_avg", exp_avg, shape[1:]),
        address("exp_avg_sq", exp_avg_sq, shape[1:]), address("delta", delta, shape[1:]),
        *scalars(step, lr, betas, eps), threads(),
    )  # fmt: skip
