"""AdamW with a snapshot of the best anchors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


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
    better = loss < best_loss
    per_task = better.reshape(-1, *[1] * (anchors.dim() - 1))
    torch.where(per_task, anchors, best_anchors, out=best_anchors)
    torch.where(better, loss, best_loss, out=best_loss)
    anchors.mul_(1 - lr * weight_decay)
    adam_(anchors, grad, exp_avg, exp_avg_sq, step, lr, betas, eps)
    if history is not None:
        record_(history, loss, step)


def record_(history: Tensor, loss: Tensor, step: int | Tensor) -> None:
    """Write the loss [K] into the ring ``history`` [capacity, K]; no host synchronisation."""
    if isinstance(step, Tensor):
        row = (step.reshape(1).to(torch.int64) - 1) % len(history)
        history.index_copy_(0, row, loss.unsqueeze(0).to(history.dtype))
        return
    history[(step - 1) % len(history)] = loss


def adam_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One update of torch.optim.Adam, in place, in torch's own order of operations."""
    deviation, scale = moments_(grad, exp_avg, exp_avg_sq, step, lr, betas)
    descend_(values, exp_avg, deviation.add_(eps), scale)


def moments_(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
) -> tuple[Tensor, float | Tensor]:
    """Update Adam's moments; the corrected root of the second, and lr over the first's correction.

    A step held on the device is never read by the host: a captured graph replays it.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    count = step.to(torch.float64) if isinstance(step, Tensor) else step
    return exp_avg_sq.sqrt().div_((1 - beta2**count) ** 0.5), lr / (1 - beta1**count)


def descend_(values: Tensor, above: Tensor, below: Tensor, scale: float | Tensor) -> None:
    """Values less scale * above / below, in place."""
    if isinstance(scale, Tensor):
        values.sub_(above.div(below).mul_(scale))
    else:
        values.addcdiv_(above, below, value=-scale)
