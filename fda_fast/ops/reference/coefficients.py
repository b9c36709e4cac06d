"""Adaptation of elementwise coefficients on task vectors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.ops.reference.adamw import descend_, moments_


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
    deviation, scale = moments_(grad, exp_avg, exp_avg_sq, step, lr, betas)
    descend_(alpha, tau * exp_avg, (tau.abs() * deviation).add_(eps), scale)
    torch.sum(alpha * tau, dim=0, out=delta)
