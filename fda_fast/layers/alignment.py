"""The alignment loss over the parameters of a program: between the backward and tangent sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        self.forget()

    def forget(self) -> None:
        """Drop what was gathered, and every M."""
        self._totals: list[Any] = [None] * len(self._leaves)
        self._directions: list[Any] = []

    def gather(self) -> None:
        """Add the gradients of the last backward to those of earlier parts."""
        pairs = zip(self._leaves, self._totals, strict=True)
        self._totals = [leaf.gather(total) for leaf, total in pairs]

    def resume(self) -> None:
        """Hand every node the M of the last ``evaluate`` again, for another part."""
        for leaf, direction in zip(self._leaves, self._directions, strict=True):
            leaf.direction = direction

    def evaluate(self, scale: float) -> tuple[Tensor, Tensor]:
        """Loss [K] and cosines [K, P]; hands every node its coefficients.

        Of the gradients of all parts, if they were gathered, else of the last backward.
        ``scale`` is what the similarity, and with it every G, was multiplied by.
        """
        gathered, self._totals = self._totals, [None] * len(self._leaves)
        # Nothing here keeps the terms: a node frees its G while the others still have theirs.
        loss, cosines, coefficients = alignment.evaluate(
            self._terms(gathered), self._squares, self._active, 1e-8 * scale
        )
        parts = coefficients.split(self._counts, dim=2)
        for leaf, part in zip(self._leaves, parts, strict=True):
            leaf.set_coefficients(part)
        if gathered[0] is not None:
            self._directions = [leaf.direction for leaf in self._leaves]
        return loss, cosines.index_select(1, self._order)

    def _terms(self, gathered: Sequence[Any]) -> list[alignment.Term]:
        """Those of all nodes, with the parameters numbered as the layer's."""
        found = []
        first = 0
        for leaf, total, count in zip(self._leaves, gathered, self._counts, strict=True):
            for term in leaf.terms(total):
                where = [None if p is None else p + first for p in term.where]
                found.append(term._replace(where=where))
            first += count
        return found
