"""One optimiser step of elementwise coefficients on task vectors, in one pass."""

from __future__ import annotations

from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops import dispatch
from fda_fast.ops.adamw import check_alike, check_step


def update_(
    alpha: Tensor,
    tau: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    delta: Tensor,
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    backend: str = "auto",
) -> None:
    """Chain rule to the coefficients, Adam on them, and the merged difference rebuilt.

        delta = sum_k alpha_k * tau_k        (elementwise),  so  dL/dalpha_k = grad * tau_k
        alpha = Adam(alpha, dL/dalpha)

    tau does not change, so Adam's moments of dL/dalpha_k are tau_k and tau_k^2 times those of
    grad: one pair of moments serves all K tasks,

        alpha_k -= lr tau_k m / (|tau_k| sqrt(v) + eps),    m, v: corrected moments of grad.

    Args:
        alpha: [K, *s] contiguous, the coefficients; updated.
        tau: [K, *s], the task vectors.
        grad: [*s], dL/ddelta.
        exp_avg: [*s], first moment of grad, zeros at first; updated.
        exp_avg_sq: [*s], second moment of grad, zeros at first; updated.
        delta: [*s], the merged parameter minus the pretrained one; written.
        step: number of this update, from 1; an int, or a one-element tensor on the device, which
            the host never reads.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        backend: "auto", "torch", "cpu", "triton" or "cuda".

    Raises:
        InputError: shapes, dtypes or devices differ, a tensor is not contiguous, or step is 0.
        RuntimeError: the backend cannot run here; says why.

    Numerics: torch.optim.Adam in the dtype of alpha, to rounding; where it would lose the square
        of a tiny dL/dalpha to underflow, the exact one is kept.
    Cost: reads 2K + 3 values and writes K + 3 per parameter element; no host synchronisation.
    Source: FDA, arXiv 2510.21223v1, Eq. 6.
    """
    check_alike("alpha", alpha, {"tau": tau})
    if alpha.shape[1:] != grad.shape or alpha.dtype != grad.dtype or alpha.device != grad.device:
        raise InputError(
            "grad",
            expected=f"{[*alpha.shape[1:]]} {alpha.dtype} on {alpha.device}",
            got=f"{[*grad.shape]} {grad.dtype} on {grad.device}",
        )
    check_alike("grad", grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "delta": delta})
    check_step(step)
    dispatch.implementation("coefficients", alpha, backend).update_(
        alpha, tau, grad, exp_avg, exp_avg_sq, delta, step, lr, betas, eps
    )
