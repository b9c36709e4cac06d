"""Adaptation of elementwise coefficients in CUDA C++; see fda_fast.ops.coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.ops.cuda.call import adam, address, launch


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
    tensors = {
        "alpha": (alpha, alpha.shape),
        "tau": (tau, alpha.shape),
        "grad": (grad, alpha.shape[1:]),
        "exp_avg": (exp_avg, alpha.shape[1:]),
        "exp_avg_sq": (exp_avg_sq, alpha.shape[1:]),
        "delta": (delta, alpha.shape[1:]),
    }
    launch(
        "coefficients_update", alpha, alpha.shape[0], grad.numel(),
        *(address(n, one, s, alpha, torch.float32) for n, (one, s) in tensors.items()),
        adam(step, lr, betas, eps, alpha),
    )  # fmt: skip
