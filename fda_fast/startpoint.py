"""The starting points inside a merge: of one layer, and of the tensors outside the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fda_fast.checkpoints.align import check_finite
from fda_fast.checkpoints.layout import LayerSpec
from fda_fast.job import Job
from fda_fast.layerwork import LayerInput
from fda_fast.starting import merge_tensor


@dataclass(frozen=True)
class StoredDeltas:
    """Tensors of the base with the task vectors of every expert, read and checked.

    Attributes:
        pretrained: {name in the base: tensor as stored}.
        deltas: {name: task vectors [K tensors], float32}; none of tensors that are not floating.
    """

    pretrained: Mapping[str, Tensor]
    deltas: Mapping[str, list[Tensor]]


def read_deltas(job: Job, names: Sequence[str]) -> StoredDeltas:
    """Tensors of the base and their task vectors, each byte read once.

    Raises:
        InputError: NaN or Inf, by tensor name.
    """
    base = job.base.read(names)
    for name, tensor in base.items():
        check_finite(name, tensor, job.base.role)
    floating = [name for name in names if base[name].is_floating_point()]
    vectors = [view.task_vectors(floating, pretrained=base) for view in job.experts.values()]
    return StoredDeltas(base, {name: [found[name] for found in vectors] for name in floating})


def merged_tensors(job: Job, stored: StoredDeltas) -> dict[str, Tensor]:
    """Tensors merged by the starting point.

    Args:
        job: the merge; its start is not "pretrained".
        stored: from ``read_deltas``.

    Returns:
        {name in the base: [*s] on the CPU}, float32, or as stored if not of floating point.
    """
    merged = {}
    for name, tensor in stored.pretrained.items():
        if name in stored.deltas:
            deltas = [delta.to(job.device) for delta in stored.deltas[name]]
            tensor = _merge(job, name, tensor.float().to(job.device), deltas).cpu()
        merged[name] = tensor
    return merged


def merged_tensor(job: Job, name: str) -> Tensor:
    """One tensor of the base read and merged: see ``read_deltas`` and ``merged_tensors``."""
    return merged_tensors(job, read_deltas(job, [name]))[name]


def _merge(job: Job, name: str, pretrained: Tensor, deltas: list[Tensor]) -> Tensor:
    settings = job.settings
    assert settings.start != "pretrained"
    position = job.positions.get(name, 0.0)
    scaling: float | list[float] = settings.factor(name, position)
    if settings.start == "task_arithmetic":
        scaling = settings.factors(name, position)
    return merge_tensor(
        settings.start,
        name,
        pretrained,
        deltas,
        scaling=scaling,
        rules=settings.starting.rules,
        steps=settings.starting.steps,
        lr=settings.starting.lr,
    )


def _merged_layer(job: Job, spec: LayerSpec, inputs: LayerInput) -> dict[str, Tensor]:
    """A layer at hand merged by the starting point, by names in the layer."""
    layers = [dict(layer.named_parameters()) for layer in inputs.finetuned.values()]
    with torch.no_grad():
        return {
            local: _merge(
                job,
                spec.parameters[local],
                parameter.detach(),
                [layer[local].detach() - parameter.detach() for layer in layers],
            )
            for local, parameter in inputs.pretrained.named_parameters()
        }


def adaptation_start(
    job: Job, spec: LayerSpec, inputs: LayerInput
) -> list[tuple[nn.Module | Mapping[str, Tensor], float | Mapping[str, float]]] | None:
    """Where adaptation of a layer begins, as ``adapt`` takes it.

    None for the pretrained layer with all weights free. For coefficients one entry per expert
    (Task Arithmetic as published in vision and RoBERTa), or one merged layer.
    """
    settings = job.settings
    if settings.start == "pretrained":
        return None
    if settings.adapt.per_task:
        factors = {
            local: settings.factors(name, job.positions.get(name, 0.0))
            for local, name in spec.parameters.items()
        }
        return [
            (layer, {local: values[k] for local, values in factors.items()})
            for k, layer in enumerate(inputs.finetuned.values())
        ]
    return [(_merged_layer(job, spec, inputs), settings.adapt.coefficient)]
