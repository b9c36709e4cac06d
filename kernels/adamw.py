"""AdamW of the anchors, the best ones kept and the loss recorded, in one pass over the anchors."""

import math

import torch
import triton
import triton.language as tl

from . import launch
from .scalar import expm1


@triton.jit
def corrections(step_ptr, scale, root, lr, log_beta1, log_beta2, STEP_ON_DEVICE: tl.constexpr):
    """Adam's bias corrections: lr / (1 - beta1^step) and the root of 1 - beta2^step.

    Of a step on the device; ``scale`` and ``root`` are those of a step that the host knows.
    1 - beta^step is -expm1(step log beta): 1 - 0.999^1 keeps its digits in float32.
    """
    if STEP_ON_DEVICE:
        step = tl.load(step_ptr).to(tl.float32)
        scale = lr / -expm1(step * log_beta1)
        root = tl.sqrt_rn(-expm1(step * log_beta2))
    return scale, root


@triton.jit
def moments(g, avg, avg_sq, root, one_minus_beta1, beta2, one_minus_beta2):
    """Adam's new moments of a register tile, and the corrected root of the second."""
    avg += (g - avg) * one_minus_beta1
    avg_sq = avg_sq * beta2 + one_minus_beta2 * g * g
    return avg, avg_sq, tl.div_rn(tl.sqrt_rn(avg_sq), root + 0.0 * avg_sq)


@triton.jit
def _adamw_step_kernel(
    anchors_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    loss_ptr,
    best_loss_ptr,
    best_ptr,
    step_ptr,
    numel,
    decay,
    scale,
    root,
    lr,
    log_beta1,
    log_beta2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    STEP_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one task; every tensor but loss, best_loss is [K, numel].

    best_loss is only read here, as other programs of the task read it too.
    """
    task = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    at = task * numel + offs
    # As a bound on the columns: the interpreter cannot combine a scalar truth with a mask.
    kept = tl.where(tl.load(loss_ptr + task) < tl.load(best_loss_ptr + task), numel, 0)
    x = tl.load(anchors_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(best_ptr + at, x, mask=offs < kept)
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0).to(tl.float32)
    avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale, root = corrections(step_ptr, scale, root, lr, log_beta1, log_beta2, STEP_ON_DEVICE)
    avg, avg_sq, deviation = moments(g, avg, avg_sq, root, one_minus_beta1, beta2, one_minus_beta2)
    x = x * decay - scale * tl.div_rn(avg, deviation + eps)
    tl.store(anchors_ptr + at, x, mask=mask)
    tl.store(exp_avg_ptr + at, avg, mask=mask)
    tl.store(exp_avg_sq_ptr + at, avg_sq, mask=mask)


# A host step changes every call: specialising on its value would compile again and again.
@triton.jit(do_not_specialize=["step"])
def _adamw_record_kernel(
    loss_ptr,
    best_loss_ptr,
    history_ptr,
    step_ptr,
    n_tasks,
    step,
    capacity,
    HAS_HISTORY: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tasks; best_loss = min, history [capacity, K] row (step - 1) mod."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_tasks
    loss = tl.load(loss_ptr + offs, mask=mask, other=0.0)
    best = tl.load(best_loss_ptr + offs, mask=mask, other=0.0)
    tl.store(best_loss_ptr + offs, loss, mask=mask & (loss < best))
    if HAS_HISTORY:
        if STEP_ON_DEVICE:
            step = tl.load(step_ptr).to(tl.int64)
        row = ((step - 1) % capacity).to(tl.int64)
        tl.store(history_ptr + row * n_tasks + offs, loss, mask=mask)


def scalars(step, lr: float, betas: tuple[float, float], eps: float) -> tuple[float, ...]:
    """Adam's scalar arguments in the kernels' order, from the step if the host has it."""
    beta1, beta2 = betas
    on_device = isinstance(step, torch.Tensor)
    scale = 0.0 if on_device else lr / (1 - beta1**step)
    root = 1.0 if on_device else (1 - beta2**step) ** 0.5
    # beta = 0 has no logarithm; expm1 of this many negative steps is -1 just the same.
    logs = [math.log(beta) if beta > 0 else -1e4 for beta in betas]
    return scale, root, lr, *logs, 1 - beta1, beta2, 1 - beta2, eps


def step_(
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
    history=None,
):
    """See ``fda_fast.ops.adamw.step_``; ``history`` [capacity, K] is a ring of the losses."""
    n_tasks = anchors.shape[0]
    if n_tasks == 0:
        return
    numel = anchors.numel() // n_tasks
    on_device = isinstance(step, torch.Tensor)
    step_ptr = step if on_device else None
    one = launch.elementwise(anchors, wide=True)[0]
    with launch.on(anchors):
        if numel:
            _adamw_step_kernel[(triton.cdiv(numel, one.block), n_tasks)](
                anchors,
                grad,
                exp_avg,
                exp_avg_sq,
                loss,
                best_loss,
                best_anchors,
                step_ptr,
                numel,
                1 - lr * weight_decay,
                *scalars(step, lr, betas, eps),
                STEP_ON_DEVICE=on_device,
                BLOCK=one.block,
                **one.options(),
            )
        _adamw_record_kernel[(triton.cdiv(n_tasks, 128),)](
            loss,
            best_loss,
            history,
            step_ptr,
            n_tasks,
            0 if on_device else step,
            1 if history is None else history.shape[0],
            HAS_HISTORY=history is not None,
            STEP_ON_DEVICE=on_device,
            BLOCK=128,
            num_warps=4,
        )
