"""How much of an update lies in the cone of other updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fda_fast import layers
from fda_fast.errors import InputError
from fda_fast.report.nnls import nnls

Update = Mapping[str, Tensor]
"""A change of weights by parameter name."""


@dataclass(frozen=True)
class Projection:
    """The projection of an update onto the cone of others.

    Attributes:
        ratio: |projection| / |update|, in [0, 1]: 1 if the update is a non-negative combination
            of the others, 0 if none of them points its way.
        coefficients: [m], not negative, float64.
    """

    ratio: float
    coefficients: Tensor


def cone_projection(update: Update, others: Sequence[Update]) -> Projection:
    """Project an update onto the cone of other updates.

        alpha = argmin over alpha >= 0 of |update - sum_i alpha_i other_i|
        ratio = |sum_i alpha_i other_i| / |update|

    The norms run over all tensors of the update together.

    Args:
        update: {parameter name: tensor}.
        others: m of them, with the same names and shapes.

    Raises:
        InputError: no others, different tensors, or an update that is zero.

    Cost: m^2 / 2 inner products of the size of an update, in float32 with sums in float64, and a
    non-negative least squares problem of m unknowns.
    Source: FDA, arXiv 2510.21223v1, section 3.2 and appendix D.
    """
    if not others:
        raise InputError("updates to project onto", expected="at least one", got="none")
    count = len(others)
    gram, products, square = torch.zeros(count, count).double(), torch.zeros(count).double(), 0.0
    for name, tensor in update.items():
        for other in others:
            if name not in other or other[name].shape != tensor.shape:
                raise InputError(f"updates: tensor {name}", expected=list(tensor.shape))
        matrix = torch.stack([other[name].detach().flatten() for other in others])
        vector = tensor.detach().flatten().to(matrix)
        gram += (matrix @ matrix.T).double().cpu()
        products += (matrix @ vector).double().cpu()
        square += vector.double().square().sum().item()
    if square == 0:
        raise InputError("update to project", expected="a value other than zero")
    coefficients = nnls(gram, products)
    # At the optimum the residual is orthogonal to the projection, so |projection|^2 = <t, A a>.
    length = coefficients.dot(products).clamp_min(0).item()
    return Projection(math.sqrt(min(1.0, length / square)), coefficients)


def induced_updates(
    pretrained_layer: nn.Module,
    finetuned_layer: nn.Module,
    inputs: Tensor,
    *,
    count: int,
    distance: str = "cosine",
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """What batches of inputs ask of the pretrained layer: minus the gradient of the distance.

        update_b = - d/dtheta_0  sum over x in batch b of Dist(layer(theta_0, x), layer(theta_i, x))

    With anchors as inputs their sum is what construction aligns with the task vector; with real
    activations these are the steps that distilling the expert on real data begins with.

    Args:
        pretrained_layer, finetuned_layer: theta_0 and theta_i; not modified.
        inputs: [n, (T,) d].
        count: batches that the inputs are dealt out to; at most n.
        distance: "cosine", "l2" or "l1".
        seed: of the dealing.

    Returns:
        ``count`` updates {parameter name: tensor}.

    Cost: a forward and a backward pass per batch; memory for ``count`` copies of the layer.
    """
    if not 1 <= count <= len(inputs):
        raise InputError("batches", expected=f"from 1 to {len(inputs)}, the inputs", got=count)
    problem = layers.bind_adaptation(
        pretrained_layer, [(inputs, finetuned_layer)], distance=distance
    )
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    updates = []
    for batch in order.tensor_split(count):
        problem.evaluate(batch)
        updates.append({name: -grad.detach().clone() for name, grad in problem.gradients.items()})
    return updates
