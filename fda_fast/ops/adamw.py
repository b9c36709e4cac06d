"""One optimiser step of the anchors: the best so far kept, then AdamW, in one pass."""

from __future__ import annotations

from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops import dispatch


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
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    history: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Keep the anchors just evaluated where their loss is the lowest yet, then update them.

        where loss_k < best_loss_k:  best_anchors_k = anchors_k,  best_loss_k = loss_k
        anchors = AdamW(anchors, grad)

    The snapshot is of the anchors before their update, the ones that loss belongs to. A loss that
    is not a number is never the best.

    Args:
        anchors: [K, ...] contiguous; updated.
        grad: like anchors.
        exp_avg: like anchors; first moment, zeros at first; updated.
        exp_avg_sq: like anchors; second moment, zeros at first; updated.
        step: number of this update, from 1; an int, or a one-element tensor on the device, which
            the host never reads (a captured CUDA graph replays it; the caller counts it up).
        loss: [K], loss of each task at these anchors.
        best_loss: [K], infinite at first; updated.
        best_anchors: like anchors; updated.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by lr.
        history: [capacity, K] or None; row (step - 1) mod capacity receives the loss.
        backend: "auto", "torch", "cpu", "triton" or "cuda".

    Raises:
        InputError: shapes, dtypes or devices differ, a tensor is not contiguous, or step is 0.
        RuntimeError: the backend cannot run here; says why.

    Numerics: torch.optim.AdamW (not amsgrad, not maximize) in the dtype of the anchors.
    Cost: reads five values and writes four per anchor element at most; no host synchronisation.
    """
    others = {
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "best_anchors": best_anchors,
    }
    check_alike("anchors", anchors, others)
    check_alike("loss", loss, {"best_loss": best_loss})
    if loss.shape != anchors.shape[:1]:
        raise InputError(
            "loss",
            expected=f"one value for each of {anchors.shape[0]} tasks",
            got=f"shape {[*loss.shape]}",
        )
    if history is not None and (history.dim() != 2 or history.shape[1:] != loss.shape):
        raise InputError(
            "history", expected=f"[capacity, {len(loss)}]", got=f"shape {[*history.shape]}"
        )
    check_step(step)
    dispatch.implementation("adamw", anchors, backend).step_(
        anchors,
        grad,
        exp_avg,
        exp_avg_sq,
        step,
        loss,
        best_loss,
        best_anchors,
        lr,
        betas,
        eps,
        weight_decay,
        history,
    )


def check_alike(name: str, first: Tensor, others: dict[str, Tensor]) -> None:
    """Refuse tensors that differ from the first in shape, dtype or device, or have gaps."""
    for other_name, other in {name: first, **others}.items():
        if other.shape != first.shape:
            raise InputError(
                other_name,
                expected=f"the shape of {name}, {[*first.shape]}",
                got=f"{[*other.shape]}",
            )
        if other.dtype != first.dtype or other.device != first.device:
            raise InputError(
                other_name,
                expected=f"{first.dtype} on {first.device} like {name}",
                got=f"{other.dtype} on {other.device}",
            )
        if not other.is_contiguous():
            raise InputError(
                other_name,
                expected="a contiguous tensor",
                got=f"strides {other.stride()}",
                fix="Pass .contiguous().",
            )


def check_step(step: int | Tensor) -> None:
    """Refuse a step below 1; one held in a tensor is not read."""
    if isinstance(step, Tensor):
        if step.numel() != 1:
            raise InputError("step", expected="one element", got=f"shape {[*step.shape]}")
    elif step < 1:
        raise InputError("step", expected="the number of this update, from 1", got=step)
