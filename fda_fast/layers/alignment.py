"""The alignment loss over the parameters of a program: between the backward and tangent sweeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.layers.program import Node
from fda_fast.ops import alignment


class Alignment:
    """L = sum_p (1 - cos(G_p, T_p)) and the coefficients of M_p = dL/dG_p.

    Args:
        root: the program.
        names: every parameter of the layer, in the order the cosines are reported in.

    Raises:
        InputError: the program covers a parameter twice, or not exactly ``names``.
    """

    def __init__(self, root: Node, names: Sequence[str]) -> None:
        self._leaves = [leaf for leaf in root.leaves() if leaf.parameters()]
        parameters = [p for leaf in self._leaves for p in leaf.parameters()]
        found = [p.name for p in parameters]
        if sorted(found) != sorted(names):
            raise InputError("parameters of the program", expected=sorted(names), got=sorted(found))
        device = parameters[0].device
        self._counts = [len(leaf.parameters()) for leaf in self._leaves]
        self._squares = torch.stack([p.square() for p in parameters], dim=1)  # [K, P]
        self._active = torch.tensor([not p.zero_gradient for p in parameters], device=device)
        self._order = torch.tensor([found.index(name) for name in names], device=device)

    def evaluate(self, scale: float) -> tuple[Tensor, Tensor]:
        """Loss [K] and cosines [K, P]; hands every node its coefficients.

        ``scale`` is what the similarity, and with it every G, was multiplied by.
        """
        dots = torch.cat([leaf.dots() for leaf in self._leaves], dim=2)
        loss, cosines, coefficients = alignment.coefficients(
            dots, self._squares, self._active, 1e-8 * scale
        )
        parts = coefficients.split(self._counts, dim=2)
        for leaf, part in zip(self._leaves, parts, strict=True):
            leaf.set_coefficients(part)
        return loss, cosines.index_select(1, self._order)
