"""RegMean of one layer: every linear map answers all tasks' inputs as their experts do.

    W = ( sum_i W_i G_i ) ( sum_i G_i )^-1,    G_i = X_i^T X_i

X_i are the inputs of the linear map inside expert i. Off-diagonal elements of G_i are scaled down;
parameters that are not weights of linear maps are averaged. Source: Jin et al., arXiv 2212.09849.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def regmean(
    experts: Sequence[nn.Module], inputs: Sequence[Tensor], *, off_diagonal: float = 0.9
) -> dict[str, Tensor]:
    """Merge one layer of several experts.

    Args:
        experts: the layer of every expert, callable on its inputs.
        inputs: [n, (T,) d] of every expert: real inputs of the layer, or anchors.
        off_diagonal: factor of the off-diagonal elements of G_i, in [0, 1].

    Returns:
        The merged layer's parameters by name, float32.
    """
    states = [dict(expert.named_parameters()) for expert in experts]
    merged = {n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]}
    grams = [_grams(expert, x, off_diagonal) for expert, x in zip(experts, inputs, strict=True)]
    for name in grams[0]:
        total = sum(gram[name] for gram in grams)
        right = sum(s[name].double() @ g[name] for s, g in zip(states, grams, strict=True))
        # A direction no task has inputs along is left to the least-norm solution.
        merged[name] = (right @ torch.linalg.pinv(total, hermitian=True, rtol=1e-10)).float()
    return merged


def _grams(layer: nn.Module, x: Tensor, off_diagonal: float) -> dict[str, Tensor]:
    """G [in, in] float64 of every linear map in the layer, by the name of its weight."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):

            def keep(_: nn.Module, args: tuple[Tensor], name: str = f"{name}.weight") -> None:
                rows = args[0].reshape(-1, args[0].shape[-1]).double()
                gram = rows.T @ rows
                diagonal = torch.diag(gram.diagonal())
                found[name] = off_diagonal * gram + (1 - off_diagonal) * diagonal

            hooks.append(module.register_forward_pre_hook(keep))
    try:
        layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
