"""Gradient matching on layers: for condensation, inversion, and whatever else fits gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fda_fast.construct import Alignment
from fda_fast.layers import Problem
from fda_fast.layers.matching import bind_objective, check_direction


def gradient_alignment(
    layer: nn.Module,
    direction: Mapping[str, Tensor],
    anchors: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    engine: str = "auto",
    precision: str = "auto",
) -> Alignment:
    """How well a layer's gradient at some inputs points along a given direction, and dL/dX.

        G_p = d objective(layer(theta, X)) / d theta_p
        L(X) = sum_p ( 1 - cos(G_p, direction_p) )        over the tensors of ``direction``

    ``alignment`` is the case in which the objective is the similarity to a fine-tuned layer's
    output and the direction its task vector. In dataset condensation the objective is the loss
    and the direction its gradient on real data; in gradient inversion it is the gradient that was
    shared. To minimise L, call this in a loop with any optimiser of ``anchors``, or bind once
    with ``gradient_matching``.

    Args:
        layer: any module that maps [n, (T,) d] to [n, (T,) d_out]. Not modified.
        direction: {name as in ``layer.named_parameters()``: tensor of its shape}, any scale, any
            float dtype; of all parameters or some.
        anchors: [n, d] or [n, T, d]; float32 (or the layer's float64).
        objective: maps the output to a scalar; twice differentiable; may hold labels.
        engine: "auto", "program" (four sweeps) or "autograd" (double backward, any module).
        precision: "auto", "fp32", "tf32" or "bf16": operands of the program's matrix products.

    Returns:
        ``Alignment``: loss in [0, 2 * len(direction)], its gradient, the cosine by name.

    Raises:
        InputError: a direction that does not fit the layer or is not finite; an objective that is
            no scalar; engine "program" for a layer that is not recognised.

    Cost: four sweeps over the layer, about 20 products of the size of its own, and a second
    derivative of the objective alone.
    Source: cosine per tensor as in FDA, arXiv 2510.21223v1, Eq. 1; gradient matching as in
    arXiv 2006.05929 (condensation) and 2003.14053 (inversion).
    """
    problem = gradient_matching(
        layer, direction, objective, tuple(anchors.shape), engine=engine, precision=precision
    )
    found = problem.evaluate(anchors.detach().unsqueeze(0))
    return Alignment.of(problem, found, direction)


def gradient_matching(
    layer: nn.Module,
    direction: Mapping[str, Tensor],
    objective: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    engine: str = "auto",
    precision: str = "auto",
) -> Problem:
    """The problem behind ``gradient_alignment``, bound once for a loop.

    Args:
        layer, direction, objective, engine, precision: as there.
        shape: of the anchors.

    Returns:
        A problem; ``evaluate(anchors[None])`` gives loss [1], grad [1, n, (T,) d] and cosines
        [1, P] as device tensors without waiting for the device. Parameters that ``direction``
        leaves out add 1 each to the loss.

    Raises:
        InputError: as there.
    """
    check_direction(layer, direction)
    return bind_objective(
        layer,
        _towards(layer, direction),
        direction,
        objective,
        shape=shape,
        engine=engine,
        precision=precision,
    )


def _towards(layer: nn.Module, direction: Mapping[str, Tensor]) -> nn.Module:
    """The layer moved along the direction, in float64: its difference is the direction.

    Each tensor is moved by its own norm: cosines do not depend on it, and a program carries the
    difference best where it is of the size of the weights.
    """
    moved = copy.deepcopy(layer).double()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name not in direction:
                continue
            step = direction[name].to(parameter)
            norm = torch.linalg.vector_norm(step)
            if not norm > 0:
                continue
            size = torch.linalg.vector_norm(parameter)
            parameter.add_(step * ((size if size > 0 else 1.0) / norm))
    return moved
