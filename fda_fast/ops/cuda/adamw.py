"""AdamW with a snapshot of the best anchors in CUDA C++; see fda_fast.ops.adamw."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.ops.cuda.call import adam, address, launch


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
    shape, tasks = anchors.shape, anchors.shape[0]
    capacity = 1 if history is None else history.shape[0]
    tensors = {
        "anchors": anchors,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
    }
    launch(
        "adamw_step", anchors, tasks, anchors.numel() // max(tasks, 1),
        *(address(name, one, shape, anchors, torch.float32) for name, one in tensors.items()),
        address("loss", loss, (tasks,), anchors),
        address("best_loss", best_loss, (tasks,), anchors),
        address("best_anchors", best_anchors, shape, anchors),
        adam(step, lr, betas, eps, anchors), 1 - lr * weight_decay,
        0 if isinstance(step, Tensor) else step,
        address("history", history, (capacity, tasks), anchors), capacity,
    )  # fmt: skip
