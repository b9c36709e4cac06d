"""AdamW with a snapshot of the best anchors, in C++; see fda_fast.ops.adamw."""

from __future__ import annotations

import math

from torch import Tensor

from fda_fast.ops.native.call import address, library, threads
from fda_fast.ops.reference.adamw import record_


def scalars(
    step: int | Tensor, lr: float, betas: tuple[float, float], eps: float
) -> tuple[float, float, float, float, float, float]:
    """beta2, 1 - beta1, 1 - beta2, lr / (1 - beta1^step), sqrt(1 - beta2^step), eps."""
    count = int(step)
    beta1, beta2 = betas
    scale, root = lr / (1 - beta1**count), math.sqrt(1 - beta2**count)
    return beta2, 1 - beta1, 1 - beta2, scale, root, eps


def step_(
    anchors: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    loss: Tensor,
    best_loss: Tensor,
    best_anchors: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    history: Tensor | None = None,
) -> None:
    """See fda_fast.ops.adamw.step_."""
    shape = anchors.shape
    tasks = shape[0]
    library().adamw_step(
        tasks, anchors.numel() // max(tasks, 1), address("anchors", anchors, shape),
        address("grad", grad, shape), address("exp_avg", exp_avg, shape),
        address("exp_avg_sq", exp_avg_sq, shape), address("loss", loss, shape[:1]),
        address("best_loss", best_loss, shape[:1]), address("best_anchors", best_anchors, shape),
        *scalars(step, lr, betas, eps), 1 - lr * weight_decay, threads(),
    )  # fmt: skip
    if history is not None:
        record_(history, loss, step)
