"""What `official_parity.py` compares: losses, files, anchors, weights."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fda_fast.checkpoints.pickles import read_npy
from fda_fast.compat.official import constructing
from fda_fast.layers.call import call_layer


@contextmanager
def histories() -> Any:
    """Collects the losses of every construction inside: ours, and those of float64."""
    found: list[tuple[Tensor, Tensor]] = []
    construct = constructing.construct

    def noted(base: nn.Module, layers: Any, starts: Any, **settings: Any) -> Any:
        result = construct(base, layers, starts, **settings)
        exact = [
            published_loop(base.double(), layer.double(), start.double(), settings)
            for layer, start in zip(layers, starts, strict=True)
        ]
        for layer in (base, *layers):
            layer.float()
        found.append((result.history, torch.stack(exact, 1)))
        return result

    constructing.construct = noted
    try:
        yield found
    finally:
        constructing.construct = construct


def published_loop(
    pretrained: nn.Module, finetuned: nn.Module, start: Tensor, settings: Any
) -> Tensor:
    """The published loop by plain autograd in float64; its losses [steps].

    The arbiter where two float32 runs part: rounding, or an error?
    """
    x = start.clone().requires_grad_()
    theta, theta_i = list(pretrained.parameters()), list(finetuned.parameters())
    taus = [(b - a).detach() for a, b in zip(theta, theta_i, strict=True)]
    optimizer = torch.optim.AdamW([x], lr=settings["lr"])
    losses = []
    for _ in range(settings["steps"]):
        optimizer.zero_grad()
        y, y_i = (call_layer(layer, x).flatten(1) for layer in (pretrained, finetuned))
        kind = settings["distance"]
        if kind == "cosine":
            similarity = F.cosine_similarity(y, y_i, dim=1).mean()
        else:
            similarity = -(F.mse_loss if kind == "l2" else F.l1_loss)(y, y_i)
        gradients = torch.autograd.grad(similarity, theta, create_graph=True)
        loss = sum(
            1 - F.cosine_similarity(g.flatten(), tau.flatten(), dim=0)
            for g, tau in zip(gradients, taus, strict=True)
        )
        assert isinstance(loss, Tensor)
        (x.grad,) = torch.autograd.grad(loss, [x])
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def files_of(root: Path) -> dict[str, Path]:
    """All files below a folder, by their path in it."""
    return {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}


def layout(path: Path) -> Any:
    """What an anchors file holds: dtype and shape of each array; "text" for another file."""
    if path.suffix != ".npy":
        return "text"
    value = read_npy(path)
    if isinstance(value, dict):
        return {key: [str(array.dtype), *array.shape] for key, array in value.items()}
    return [str(value.dtype), *value.shape]


def anchors(path: Path) -> Tensor:
    """The anchors of a file, in the file's own layout."""
    value = read_npy(path)
    return torch.from_numpy(value["input"] if isinstance(value, dict) else value)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a|."""
    return ((a - b).norm() / a.norm()).item()


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """The tensor with zeros where it belongs to a key bias: RoBERTa's, or a third of CLIP's."""
    if name.endswith("key.bias"):
        return torch.zeros_like(tensor)
    if name.endswith("in_proj_bias"):
        tensor = tensor.clone()
        tensor.chunk(3)[1].zero_()
    return tensor


def norm(tensors: Any) -> float:
    """The norm of all together."""
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5
