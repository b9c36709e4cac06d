"""Where in a model the layers to merge are: whole blocks, their MLPs, or a mixture's experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import transformers
from torch import nn

from fda_fast.checkpoints.mixture import shared_mlps
from fda_fast.checkpoints.repeated import mixture_of_experts, mlp_of
from fda_fast.errors import InputError

Scope = Literal["auto", "block", "mlp"]


def layer_paths(
    model: transformers.PreTrainedModel,
    lists: Mapping[str, nn.ModuleList | nn.Sequential],
    scope: Scope,
    decoder: bool,
) -> tuple[list[tuple[str, str]], list[str]]:
    """(path in the skeleton, "block" | "mlp") of every layer to merge.

    A layer with a mixture of experts gives (its path, "experts"), and its shared MLPs.
    """
    blocks = {f"{path}.{i}": layer for path, ls in lists.items() for i, layer in enumerate(ls)}
    if not blocks:
        raise InputError(
            f"no repeated layers in {type(model).__name__}",
            expected="a list of modules of one class that holds the bulk of the parameters",
        )
    mixtures = {path for path, layer in blocks.items() if mixture_of_experts(layer)}
    if mixtures and (scope == "block" or (scope == "auto" and not decoder)):
        path = min(mixtures)
        raise InputError(
            f"layer {path} is a mixture of experts ({mixture_of_experts(blocks[path])})",
            expected="scope 'mlp'",
            got=f"scope {scope!r}",
            fix="Routing is no smooth function of the layer's input: merge the experts' MLPs",
        )
    config = getattr(model, "config", None)  # a plain module has none
    two_sided = bool(getattr(config, "is_encoder_decoder", False))
    if two_sided and scope == "block":
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder",
            expected="scope 'mlp'",
            got="scope 'block'",
            fix="Its decoder layers take two inputs, anchors are one: merge the MLPs",
        )
    if mixtures:
        return _mixture_paths(blocks, mixtures), []
    mlps = {path: mlp_of(layer) for path, layer in blocks.items()}
    lacking = [path for path, mlp in mlps.items() if mlp is None]
    if scope == "mlp" or (scope == "auto" and (decoder or two_sided)):
        if not lacking:
            return [(f"{path}.{mlp}", "mlp") for path, mlp in mlps.items()], []
        if scope == "mlp":
            raise InputError(
                f"layer {lacking[0]} ({type(blocks[lacking[0]]).__name__}) has no MLP module",
                expected="a module of its own for the MLP of each layer",
                fix="Use scope 'block'",
            )
        return [(path, "block") for path in blocks], [
            f"the layers have no MLP module ({lacking[0]}): whole layers are merged"
        ]
    return [(path, "block") for path in blocks], []


def _mixture_paths(blocks: Mapping[str, nn.Module], mixtures: set[str]) -> list[tuple[str, str]]:
    """Experts and shared MLPs of the layers that have them, the MLPs of the others."""
    places = []
    for path, layer in blocks.items():
        if path in mixtures:
            places.append((path, "experts"))
            places += [(f"{path}.{shared}", "mlp") for shared in shared_mlps(layer)]
        elif mlp := mlp_of(layer):
            places.append((f"{path}.{mlp}", "mlp"))
    return places
