"""One call in place of the published optimisation loop, on its modules and tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fda_fast.compat.official.flags import LOSSES
from fda_fast.construct import construct
from fda_fast.errors import InputError
from fda_fast.layers.call import call_layer


@dataclass(frozen=True)
class Optimised:
    """What the published loop leaves in its variables.

    Attributes:
        best_X: the anchors with the lowest loss among those evaluated, in the layout given.
        gt: the fine-tuned layer's output for them, in the same layout.
        best_loss: their alignment loss, a sum over parameter tensors.
        losses: the loss before every step, [opt_steps], on the CPU.
    """

    best_X: Tensor
    gt: Tensor = field(repr=False)
    best_loss: float
    losses: Tensor = field(repr=False)


def optimise(
    pretrained_layer: nn.Module,
    finetuned_layer: nn.Module,
    anchors: Tensor,
    opt_steps: int,
    opt_lr: float,
    loss: str = "cos",
    *,
    engine: str = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> Optimised:
    """Optimise the anchors of one (layer, task) as the loops in ``construct_fda.py`` do.

    Args:
        pretrained_layer: a ``ResidualAttentionBlock``, ``RobertaLayer`` or ``LlamaMLP``, or any
            module that maps one tensor to one.
        finetuned_layer: the same with fine-tuned weights.
        anchors: the script's X: [tokens, anchors, d] for a sequence-first block, as in Vision;
            [anchors, tokens, d] for NLU; [anchors, d] for NLG. Not modified.
        opt_steps: AdamW steps.
        opt_lr: AdamW's learning rate; its other settings are torch's defaults, as published.
        loss: "cos", "mse" or "l1": the script's ``--anchor_loss``.
        engine: "auto", "program" or "autograd", as for ``fda_fast.construct``.
        precision: "auto", "fp32", "tf32" or "bf16", likewise.
        progress: draw a progress bar on stderr.

    Returns:
        ``Optimised``, on the device of ``anchors``.

    Raises:
        InputError: an unknown loss, layers that differ, anchors of a wrong shape.
        RuntimeError: the loss was never finite.

    Cost: that of ``fda_fast.construct`` with as many steps.
    Source: FDA, arXiv 2510.21223v1, Eq. 2, and the official construct_fda.py.
    """
    if loss not in LOSSES:
        raise InputError("loss", expected=" | ".join(LOSSES), got=repr(loss))
    swapped = anchors.dim() == 3 and is_sequence_first(finetuned_layer)
    start = anchors.detach().transpose(0, 1).contiguous() if swapped else anchors.detach()
    found = construct(
        pretrained_layer,
        finetuned_layer,
        start,
        steps=opt_steps,
        lr=opt_lr,
        distance=LOSSES[loss],
        engine=engine,
        precision=precision,
        progress=progress,
    )
    assert isinstance(found.loss, float)
    with torch.no_grad():
        target = call_layer(finetuned_layer, found.anchors)
    best, target = (x.transpose(0, 1) if swapped else x for x in (found.anchors, target))
    return Optimised(best.contiguous(), target.contiguous(), found.loss, found.history)


def is_sequence_first(layer: nn.Module) -> bool:
    """Whether a block takes [tokens, anchors, d]: torch's attention before ``batch_first``."""
    return any(
        isinstance(module, nn.MultiheadAttention) and not module.batch_first
        for module in layer.modules()
    )
