"""Adaptation of one layer to all tasks' anchors, first order, as a program.

    loss = sum over the chosen anchors of Dist(layer(theta_0 + delta, x), layer(theta_i, x))

What matters is again a difference: of the layer's output to the target. Both are held as
differences to the pretrained output, dy and dy_i, and the residual is dy_i - dy.

With fp32 products the program carries theta_0 + delta as one set of weights (3 products per Linear,
as a plain backward). With tf32 or bf16 products it carries both apart (delta form, 4 products and
one for the pretrained branch), so that rounding is relative to what moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fda_fast.layers.evaluation import check_part
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision
from fda_fast.layers.program import Node
from fda_fast.ops import similarity

# Most anchors of which targets are computed at once.
_CHUNK = 64


class ProgramAdaptation:
    """Loss and gradients of adaptation, by a forward and an adjoint sweep.

    Args:
        build: makes the program of the layer from its materials.
        pretrained: the layer at theta_0.
        tasks: (anchors [n, (T,) d], fine-tuned layer) of every task.
        distance: "cosine" (minus the sum of cosines), "l2" or "l1" (summed).
        precision: of the products. Targets are computed in fp32, or float64 for such a layer.
        merged: one set of weights rather than delta form; default: only if precision is fp32.
        part: anchors that the sweeps hold at once; None for a whole batch. The same numbers to
            rounding.

    Attributes:
        parameter_names: in the order of ``named_parameters()``.
        deltas: name -> theta - theta_0, zeros at first; written in place by the optimiser, who then
            calls ``refresh``.
        gradients: name -> d loss / d theta at the last evaluation; the same tensors every time.
        size: total number of anchors; indices run over the tasks in order.
    """

    def __init__(
        self,
        build: Callable[[Materials], Node],
        pretrained: nn.Module,
        tasks: Sequence[tuple[Tensor, nn.Module]],
        *,
        distance: str = "cosine",
        precision: Precision,
        dtype: torch.dtype = torch.float32,
        merged: bool | None = None,
        part: int | None = None,
    ) -> None:
        similarity.check_kind(distance)
        check_part(part)
        self._part = part
        self._kind = distance
        merged = precision.name == "fp32" if merged is None else merged
        anchors = torch.cat([x.detach() for x, _ in tasks]).to(precision.device, dtype)
        self.size = anchors.shape[0]
        tokens = anchors.shape[1] if anchors.dim() == 3 else 1
        self._x = anchors.view(self.size, tokens, anchors.shape[-1])
        chunk = min(_CHUNK, part or _CHUNK)
        targets = [
            _target(build, pretrained, layer, x.to(self._x), tokens, merged, chunk)
            for x, layer in tasks
        ]
        self._targets = torch.cat(targets)  # [N, T, d_out], y_i if merged, else y_i - y
        materials = Materials(
            pretrained,
            None,
            tokens=tokens,
            precision=precision,
            merged=merged,
            dtype=dtype,
            device=precision.device,
        )
        self._precision, self._merged = precision, merged
        self._root = build(materials)
        self.parameter_names = list(materials.names)
        self._parameters = materials.parameters
        parameters = {p.name: p for p in materials.parameters}
        self.deltas = {name: parameters[name].master for name in materials.names}
        self.gradients = {name: parameters[name].grad for name in materials.names}

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the optimiser wrote into ``deltas``."""
        self._root.refresh()

    @torch.no_grad()
    def evaluate(self, index: Tensor) -> Tensor:
        """Loss (scalar, no host sync) of the anchors ``index`` [B]; fills ``gradients``."""
        index = index.to(self._x.device, non_blocking=True)
        first, *others = index.split(self._part or max(1, len(index)))
        loss = self._evaluate_part(first, add=False)
        for part in others:
            loss = loss + self._evaluate_part(part, add=True)
        return loss

    def _evaluate_part(self, index: Tensor, *, add: bool) -> Tensor:
        for parameter in self._parameters:
            parameter.adds = add
        x = self._x.index_select(0, index)
        target = self._targets.index_select(0, index)
        try:
            with self._precision.active():
                y, dy = self._root.forward(x.view(1, -1, x.shape[-1]), None)
                loss, b = self._distance(y, dy, target)
                self._root.adjoint(b, False)
        finally:
            self._root.release()
        return loss

    def _distance(self, y: Tensor, dy: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and its cotangent at the output [1, B * T, d]."""
        shape, flat = y.shape, (1, target.shape[0], target[0].numel())
        base = y if dy is None else dy
        residual = target.view(shape) - base
        y_f = y if dy is None else y + dy
        scale = float(flat[1] if self._kind == "cosine" else target.numel())
        s, g = similarity.forward(self._kind, y_f.view(flat), residual.view(flat), scale)
        return -s.squeeze(0), g.neg_().view(shape)


@torch.no_grad()
def _target(
    build: Callable[[Materials], Node],
    pretrained: nn.Module,
    finetuned: nn.Module,
    anchors: Tensor,
    tokens: int,
    whole: bool,
    chunk: int,
) -> Tensor:
    """Outputs [n, T, d] of the fine-tuned layer; their difference to theta_0's unless whole."""
    precision = Precision("fp32", anchors.device)
    materials = Materials(
        pretrained,
        [finetuned],
        tokens=tokens,
        precision=precision,
        dtype=anchors.dtype,
        device=anchors.device,
    )
    root = build(materials)
    found = []
    with precision.active():
        for x in anchors.split(chunk):
            y, dy = root.forward(x.reshape(1, -1, x.shape[-1]), None)
            dy = torch.zeros_like(y) if dy is None else dy
            found.append((y + dy if whole else dy).view(x.shape[0], tokens, -1).clone())
            root.release()
    return torch.cat(found)
