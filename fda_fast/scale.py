"""Choosing sigma of Gaussian anchors: one draw, several scales, a few steps, the best kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fda_fast.anchors import Layout, init_anchors
from fda_fast.construct import NeverFinite, construct
from fda_fast.errors import InputError

SCALES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""From the smallest to the largest sigma that the paper tries (table 4), a factor of ten apart."""

STEPS = 100
"""Steps per sigma: the curves of the paper's figure 4 have parted by then."""


@dataclass(frozen=True)
class ScaleChoice:
    """What the search for sigma found.

    Attributes:
        scale: the sigma with the lowest loss; of equal ones the smallest.
        losses: alignment loss reached with each sigma, mean over the fine-tuned layers; infinite
            where it was never finite.
        steps: construction steps done with each.
    """

    scale: float
    losses: dict[float, float]
    steps: int


def choose_scale(
    pretrained_layer: nn.Module,
    finetuned_layers: nn.Module | Sequence[nn.Module],
    shape: Sequence[int],
    *,
    scales: Sequence[float] = SCALES,
    steps: int = STEPS,
    lr: float = 1e-2,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    distance: str = "cosine",
    engine: str = "auto",
    precision: str = "auto",
    layout: Layout = "anchor_first",
    seed: int = 0,
) -> ScaleChoice:
    """Sigma for ``init_anchors(scheme="gaussian")``, chosen on one layer.

    Every sigma starts from the same standard normal draw, takes the same number of steps, and is
    judged by the alignment loss reached.

    Args:
        pretrained_layer: module with the weights theta_0.
        finetuned_layers: one fine-tuned layer or several; each is optimised by itself, so memory
            is that of one.
        shape: of the anchors, [n, T, d] or [n, d].
        scales: the candidates, positive and finite.
        steps: construction steps for each.
        lr, weight_decay, betas, eps, distance, engine, precision: as ``construct``.
        layout: as ``init_anchors``.
        seed: of the draw; fine-tuned layer number k draws with seed + k.

    Returns:
        ``ScaleChoice``; the same for the same arguments.

    Raises:
        InputError: no candidates, or what ``construct`` refuses.
        NeverFinite: no candidate gave a finite loss.

    Cost: ``len(scales) * steps`` construction steps for every fine-tuned layer.
    Source: FDA, arXiv 2510.21223v1, appendix C.5.
    """
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise InputError("scales", expected="positive finite numbers", got=list(scales))
    layers = [finetuned_layers] if isinstance(finetuned_layers, nn.Module) else finetuned_layers
    if not layers:
        raise InputError("fine-tuned layers", expected="at least one", got="none")
    losses = dict.fromkeys(sorted(scales), 0.0)
    for k, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(seed + k)
        unit = init_anchors(layer, shape, "gaussian", 1.0, generator, layout=layout)
        for scale in losses:
            try:
                found = construct(
                    pretrained_layer,
                    layer,
                    unit * scale,
                    steps=steps,
                    lr=lr,
                    weight_decay=weight_decay,
                    betas=betas,
                    eps=eps,
                    distance=distance,
                    engine=engine,
                    precision=precision,
                    progress=False,
                )
            except NeverFinite:
                losses[scale] = math.inf
                continue
            assert isinstance(found.loss, float)
            losses[scale] += found.loss / len(layers)
    best = min(losses, key=lambda scale: losses[scale])
    if not math.isfinite(losses[best]):
        raise NeverFinite(f"No sigma of {list(losses)} gave a finite alignment loss.")
    return ScaleChoice(best, losses, steps)
