"""Finding the layers of a model by structure: the long lists of alike modules it is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# A list of alike modules with less than this share of all listed parameters is not "the layers".
_BULK = 0.05
_MLP_NAME = re.compile(r"^(mlp|feed_forward|ffn|ff|dense_?relu_?dense)$", re.IGNORECASE)
_MOE_CLASS = re.compile(r"(Experts|Router|MoE|Moe|MoeBlock|MoeLayer)$")

Layers = nn.ModuleList | nn.Sequential


def repeated_layers(model: nn.Module) -> dict[str, Layers]:
    """The lists of layers that hold the bulk of a model's parameters, by path.

    A list counts when its modules are of one class. The outermost such lists are taken, except
    that a list of stages (alike in class, not in shape, with such lists inside that hold most of
    it) gives way to those inside: a CLIP model has two lists, a Swin model one per stage. Only a
    model without any list, as those of timm, has its layers in an ``nn.Sequential``.
    """
    found: dict[str, Layers] = dict(_lists(model, "", nn.ModuleList))
    if not found:
        found = dict(_lists(model, "", nn.Sequential))
    total = sum(map(_numel, found.values()))
    return {path: layers for path, layers in found.items() if _numel(layers) >= _BULK * total}


def mlp_of(layer: nn.Module) -> str | None:
    """The path of the MLP inside a layer, None where it has no module of its own."""
    paths = [path for path, _ in layer.named_modules() if _MLP_NAME.match(path.rsplit(".", 1)[-1])]
    return min(paths, key=lambda path: path.count("."), default=None)


def mixture_of_experts(layer: nn.Module) -> str | None:
    """The class name of a mixture-of-experts module inside a layer, None where there is none."""
    # The layer itself is called after its model, dense or not.
    names = (type(module).__name__ for module in layer.modules() if module is not layer)
    return next((name for name in names if _MOE_CLASS.search(name)), None)


def input_width(layer: nn.Module) -> int:
    """Width d of the vectors a layer takes: what its first linear map takes; 0 if it has none."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, Conv1D):
            return int(module.weight.shape[0])
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim
    return 0


def _lists(module: nn.Module, path: str, kind: type[Any]) -> Iterator[tuple[str, Layers]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, kind) and _alike(child) and _numel(child):
            nested = dict(_lists(child, inner, kind))
            stages = len({_shapes(layer) for layer in child}) > 1
            if stages and 2 * sum(map(_numel, nested.values())) > _numel(child):
                yield from nested.items()
            else:
                yield inner, child
        else:
            yield from _lists(child, inner, kind)


def _alike(layers: Layers) -> bool:
    return len({type(layer) for layer in layers}) == 1


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _shapes(module: nn.Module) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset((name, tuple(p.shape)) for name, p in module.named_parameters())
