"""Task vectors known as products of two thin matrices, as those of LoRA experts are.

A fine-tuned layer says so itself: whoever builds it from base and adapter attaches the factors, and
whoever makes a program of it finds them. Nothing between needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fda_fast.errors import InputError

Factors = tuple[Tensor, Tensor]
_ATTRIBUTE = "_fda_fast_factors"


def attach_factors(layer: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Tell that task vectors of a fine-tuned layer are products.

    Construction then multiplies by the factors in place of their product, in fp32; a quarter of a
    step less for a rank far below the width. A wrong product is found out when the program is
    compared with the layer.

    Args:
        layer: the fine-tuned layer; its parameters hold pretrained + left @ right.
        factors: (left [m, r], right [r, n]) by parameter name; r may be 0 for an unchanged [m, n].

    Raises:
        InputError: an unknown parameter, or shapes that do not fit.
    """
    parameters = dict(layer.named_parameters())
    for name, (left, right) in factors.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
        if not fits or shape != (left.shape[0], right.shape[1]):
            raise InputError(
                f"factors of parameter {name}",
                expected=f"[m, r] and [r, n] with [m, n] = {shape}",
                got=f"{list(left.shape)} and {list(right.shape)}",
            )
    setattr(layer, _ATTRIBUTE, dict(factors))


def factors_of(layer: nn.Module, name: str) -> Factors | None:
    """The factors of a parameter's task vector, or None where it is not known as a product."""
    found: Factors | None = getattr(layer, _ATTRIBUTE, {}).get(name)
    return found


def stack(factors: Sequence[Factors], dtype: torch.dtype, device: torch.device) -> Factors:
    """Factors of K tasks as [K, m, r] and [K, r, n]; lower ranks are padded with zeros."""
    rank = max(left.shape[1] for left, _ in factors)
    (m, _), (_, n) = factors[0][0].shape, factors[0][1].shape
    lefts = torch.zeros((len(factors), m, rank), dtype=dtype, device=device)
    rights = torch.zeros((len(factors), rank, n), dtype=dtype, device=device)
    for k, (left, right) in enumerate(factors):
        lefts[k, :, : left.shape[1]] = left
        rights[k, : right.shape[0]] = right
    return lefts, rights


def square_norm(left: Tensor, right: Tensor) -> Tensor:
    """|left right|^2 of [K, m, r] and [K, r, n] as <left^T left, right right^T>, [K], float64."""
    left, right = left.double(), right.double()
    return ((left.mT @ left) * (right @ right.mT)).sum((1, 2)).clamp_min(0)
