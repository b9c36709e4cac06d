"""Adaptation of elementwise coefficients: chain rule, Adam and the rebuilt sum in one pass."""

import torch
import triton
import triton.language as tl

from . import launch
from .adamw import adam_value, scalars


@triton.jit
def _coefficients_update_kernel(
    alpha_ptr,
    tau_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    delta_ptr,
    step_ptr,
    numel,
    n_tasks,
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
    """One program: BLOCK elements of grad, delta [numel] and of all tasks' alpha, tau [K, numel].

    The gradient is read once, and the sum over the tasks stays in registers.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.zeros([BLOCK], dtype=tl.float32)
    at = offs
    for _ in range(n_tasks):
        tau = tl.load(tau_ptr + at, mask=mask, other=0.0).to(tl.float32)
        alpha = tl.load(alpha_ptr + at, mask=mask, other=0.0).to(tl.float32)
        avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0).to(tl.float32)
        avg_sq = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0).to(tl.float32)
        alpha, avg, avg_sq = adam_value(
            alpha,
            g * tau,
            avg,
            avg_sq,
            step_ptr,
            scale,
            root,
            lr,
            log_beta1,
            log_beta2,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            eps,
            STEP_ON_DEVICE,
        )
        delta += alpha * tau
        tl.store(alpha_ptr + at, alpha, mask=mask)
        tl.store(exp_avg_ptr + at, avg, mask=mask)
        tl.store(exp_avg_sq_ptr + at, avg_sq, mask=mask)
        at += numel
    tl.store(delta_ptr + offs, delta, mask=mask)


def update_(alpha, tau, grad, exp_avg, exp_avg_sq, delta, step, lr, betas, eps):
    """See ``fda_fast.ops.coefficients.update_``."""
    numel = grad.numel()
    if numel == 0:
        return
    on_device = isinstance(step, torch.Tensor)
    one = launch.elementwise(grad, wide=True)[0]
    with launch.on(grad):
        _coefficients_update_kernel[(triton.cdiv(numel, one.block),)](
            alpha,
            tau,
            grad,
            exp_avg,
            exp_avg_sq,
            delta,
            step if on_device else None,
            numel,
            alpha.shape[0],
            *scalars(step, lr, betas, eps),
            STEP_ON_DEVICE=on_device,
            BLOCK=one.block,
            **one.options(),
        )
