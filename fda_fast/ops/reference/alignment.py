"""Alignment of gradients with task vectors, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast.ops import memory


def _columns(c: Tensor, widths: Sequence[int]) -> Tensor:
    """[K, S] -> [K, 1, 1] or [K, 1, sum(widths)], each segment's number over its columns."""
    if len(widths) == 1:
        return c.unsqueeze(1)
    spans = [c[:, s : s + 1].expand(-1, width) for s, width in enumerate(widths)]
    return torch.cat(spans, dim=1).unsqueeze(1)


def dots(g: Tensor, u: Tensor, v: Tensor, widths: Sequence[int]) -> Tensor:
    """See fda_fast.ops.alignment.dots."""
    product = memory.empty(g.shape, g)
    out = g.new_empty((2, g.shape[0], len(widths)))
    for row, other in zip(out, (u, v), strict=True):
        torch.mul(g, other, out=product)
        start = 0
        for s, width in enumerate(widths):
            row[:, s] = product[:, :, start : start + width].sum((1, 2))
            start += width
    return out


def mix(
    alpha: Tensor, u: Tensor, beta: Tensor, v: Tensor, widths: Sequence[int], row: Tensor | None
) -> Tensor:
    """See fda_fast.ops.alignment.mix."""
    out = torch.mul(v, _columns(beta, widths), out=memory.empty(v.shape, v))
    out.addcmul_(u, _columns(alpha, widths))
    return out if row is None else out.add_(row.unsqueeze(1))


def coefficients(
    dots: Tensor, squares: Tensor, active: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See fda_fast.ops.alignment.coefficients."""
    dot, square = dots
    norm_t = squares.sqrt()
    used = active & (norm_t > 0)
    norm_g = square.clamp_min(0).sqrt()
    floored_g, floored_t = norm_g.clamp_min(eps), norm_t.clamp_min(1e-8)
    zero = torch.zeros_like(dot)
    cosines = torch.where(used, dot / (floored_g * floored_t), zero)
    alpha = torch.where(used, -1 / (floored_g * floored_t), zero)
    # d|G|/dG is zero at G = 0
    beta = torch.where(norm_g > 0, cosines / (floored_g * norm_g), zero)
    return (1 - cosines).sum(1), cosines, torch.stack([alpha, beta])
