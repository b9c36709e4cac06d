"""The starting points inside a merge: of one layer, and of the tensors outside the layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fda_fast.checkpoints.align import check_finite
from fda_fast.checkpoints.layout import LayerSpec
from fda_fast.job import Job
from fda_fast.layerwork import LayerInput
from fda_fast.starting import merge_tensor


def merged_tensor(job: Job, name: str) -> Tensor:
    """One tensor of the base merged by the starting point, read from the checkpoints.

    Args:
        job: the merge; its start is not "pretrained".
        name: in the base.

    Returns:
        [*s] on the CPU: float32, or as stored if it is no floating-point tensor.

    Raises:
        InputError: NaN or Inf, by tensor name.
    """
    base = job.base.read([name])
    pretrained = base[name]
    check_finite(name, pretrained, job.base.role)
    if not pretrained.is_floating_point():
        return pretrained
    deltas = [
        view.task_vectors([name], pretrained=base)[name].to(job.device)
        for view in job.experts.values()
    ]
    return _merge(job, name, pretrained.float().to(job.device), deltas).cpu()


def _merge(job: Job, name: str, pretrained: Tensor, deltas: list[Tensor]) -> Tensor:
    settings = job.settings
    assert settings.start != "pretrained"
    scaling: float | list[float] = settings.starting.scaling
    if settings.start == "task_arithmetic":
        scaling = [settings.starting.scaling * weight for weight in settings.weights]
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
) -> list[tuple[nn.Module | Mapping[str, Tensor], float]] | None:
    """Where adaptation of a layer begins, as ``adapt`` takes it.

    None for the pretrained layer with all weights free. For coefficients one entry per expert
    (Task Arithmetic as published in vision and RoBERTa), or one merged layer.
    """
    settings = job.settings
    if settings.start == "pretrained":
        return None
    if settings.adapt.per_task:
        layers = inputs.finetuned.values()
        return [
            (layer, settings.adapt.coefficient * weight)
            for layer, weight in zip(layers, settings.weights, strict=True)
        ]
    return [(_merged_layer(job, spec, inputs), settings.adapt.coefficient)]
