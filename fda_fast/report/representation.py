"""How far a merged model's features are from an expert's, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fda_fast.errors import InputError


@dataclass(frozen=True)
class Bias:
    """Distance of one model's features from another's on the same inputs.

    Attributes:
        mean_absolute: mean of |h - h'| over all elements: the representation bias of
            Representation Surgery, in the unit of the features.
        relative: |h - h'| / |h'|, Frobenius norms; no unit.
        cosine: mean over vectors of 1 - cos(h, h'), in [0, 2].
    """

    mean_absolute: float
    relative: float
    cosine: float


def representation_bias(features: Tensor, expert: Tensor) -> Bias:
    """The distance of features from an expert's.

    Args:
        features: [..., d] of the merged model.
        expert: [..., d] of the expert on the same inputs.

    Raises:
        InputError: shapes that differ, or an expert whose features are all zero.

    Source: Yang et al., Representation Surgery for Multi-Task Model Merging, 2024, section 3.
    """
    if features.shape != expert.shape:
        raise InputError("features", expected=list(expert.shape), got=list(features.shape))
    ours, theirs = features.detach().double(), expert.detach().double()
    length = theirs.norm()
    if not bool(length > 0):
        raise InputError("features of the expert", expected="a value other than zero")
    difference = ours - theirs
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    return Bias(
        difference.abs().mean().item(),
        (difference.norm() / length).item(),
        (1 - cosine).mean().item(),
    )


def hidden_states(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], layers: Mapping[str, str]
) -> dict[str, Tensor]:
    """What layers of a model put out while it reads inputs.

    Args:
        model: run in eval mode, without gradients; not modified.
        batches: keyword arguments of the model.
        layers: {name in the result: path of the module}.

    Returns:
        {name: [tokens of all inputs, d]}, float32 on the CPU.

    Raises:
        InputError: no inputs.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> object:
        def hook(_: nn.Module, __: object, output: object) -> None:
            y = output[0] if isinstance(output, tuple | list) else output
            assert isinstance(y, Tensor)
            kept[name].append(y.reshape(-1, y.shape[-1]).to("cpu", torch.float32, copy=True))

        return hook

    hooks = [
        model.get_submodule(path).register_forward_hook(keep(name))  # type: ignore[arg-type]
        for name, path in layers.items()
    ]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    if not all(kept.values()):
        raise InputError("inputs", expected="at least one batch", got="none")
    return {name: torch.cat(parts) for name, parts in kept.items()}
