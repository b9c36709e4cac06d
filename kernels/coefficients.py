"""Adaptation of elementwise coefficients: chain rule, Adam and the rebuilt sum in one pass."""

import torch
import triton
import triton.language as tl

from . import launch
from .adamw import corrections, moments, scalars


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
    """One program: BLOCK elements of grad, its moments, delta [numel] and alpha, tau [K, numel].

    The moments serve all tasks, and the sum over the tasks stays in registers.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale, root = corrections(step_ptr, scale, root, lr, log_beta1, log_beta2, STEP_ON_DEVICE)
    avg, avg_sq, deviation = moments(g, avg, avg_sq, root, one_minus_beta1, beta2, one_minus_beta2)
    tl.store(exp_avg_ptr + offs, avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, avg_sq, mask=mask)
    delta = tl.zeros([BLOCK], dtype=tl.float32)
    at = offs
    for _ in range(n_tasks):
        tau = tl.load(tau_ptr + at, mask=mask, other=0.0).to(tl.float32)
        alpha = tl.load(alpha_ptr + at, mask=mask, other=0.0).to(tl.float32)
        alpha -= scale * tl.div_rn(tau * avg, tl.abs(tau) * deviation + eps)
        delta += alpha * tau
        tl.store(alpha_ptr + at, alpha, mask=mask)
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
