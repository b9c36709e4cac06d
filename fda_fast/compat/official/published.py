"""The NLU adapt loop as published, where the engines' arithmetic differs from it on purpose.

It fits to the targets stored with the anchors, and from a merged start it runs the layer in
training mode: the merged layer's dropout is on, against targets made without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fda_fast.layers.call import call_keywords

Weights = nn.Module | Mapping[str, Tensor]


def adapt(
    layer: nn.Module,
    anchors: Tensor,
    targets: Tensor,
    start: Sequence[tuple[Weights, float]] | None,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    loss: str,
    order: Callable[[int], Tensor],
) -> tuple[nn.Module, Tensor]:
    """Fit a layer by plain autograd.

    Args:
        layer: the pretrained layer. Not modified.
        anchors: [N, T, d] of all tasks.
        targets: [N, T, d], their stored targets.
        start: None to train the pretrained weights themselves, else [(weights theta_k, alpha_k)]
            whose elementwise coefficients are trained.
        epochs, lr, batch_size: of Adam.
        loss: "cos", "mse" or "l1", summed over the batch.
        order: permutation [N] of an epoch, counted from 1.

    Returns:
        A copy of the layer with the last weights, and the mean loss of an anchor by epoch.

    Source: NLU/adapt.py, arithmetic only. Dropout draws from torch's global generator, in an order
    that depends on the attention implementation of the installed transformers.
    """
    base = {name: p.detach() for name, p in layer.named_parameters()}
    merged: Callable[[], dict[str, Tensor]]
    if start is None:
        weights = {name: p.clone().requires_grad_() for name, p in base.items()}
        leaves = list(weights.values())
        merged = lambda: weights  # noqa: E731
    else:
        vectors = [_task_vector(base, theta) for theta, _ in start]
        alphas = [
            {name: torch.full_like(p, alpha).requires_grad_() for name, p in base.items()}
            for _, alpha in start
        ]
        leaves = [alpha for each in alphas for alpha in each.values()]
        merged = lambda: {  # noqa: E731
            name: p + sum(a[name] * tau[name] for a, tau in zip(alphas, vectors, strict=True))
            for name, p in base.items()
        }
    worker = copy.deepcopy(layer).train(start is not None)
    keywords = call_keywords(layer, anchors[:1])
    optimizer = torch.optim.Adam(leaves, lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        total = 0.0
        for index in order(epoch).split(batch_size):
            optimizer.zero_grad()
            output = functional_call(worker, merged(), (anchors[index],), keywords)
            output = output[0] if isinstance(output, tuple | list) else output
            value = _loss(loss, output.flatten(1), targets[index].flatten(1))
            value.backward()
            optimizer.step()
            total += value.item()
        history.append(total / len(anchors))
    adapted = copy.deepcopy(layer)
    with torch.no_grad():
        final = merged()
        for name, parameter in adapted.named_parameters():
            parameter.copy_(final[name])
    return adapted, torch.tensor(history)


def _task_vector(base: Mapping[str, Tensor], theta: Weights) -> dict[str, Tensor]:
    named = dict(theta.named_parameters()) if isinstance(theta, nn.Module) else theta
    return {name: named[name].detach().to(p) - p for name, p in base.items()}


def _loss(kind: str, output: Tensor, target: Tensor) -> Tensor:
    if kind == "cos":
        return -F.cosine_similarity(output, target, dim=1).sum()
    if kind == "mse":
        return F.mse_loss(output, target, reduction="sum")
    return F.l1_loss(output, target, reduction="sum")
