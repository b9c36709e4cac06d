"""From an nn.Module to the recipe of its program.

A layer is recognised by its structure: what its sub-modules are called in the block families that
exist, what kind each of them is, and how its activation and norms behave on a few numbers. A recipe
lists every parameter of ``named_parameters()``; a layer with one left over is not recognised.
Structure alone cannot prove what a forward computes: ``bind`` compares the program with autograd on
random input before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fda_fast.layers import recognise_blocks as blocks
from fda_fast.layers.parameter import Materials
from fda_fast.layers.program import Node
from fda_fast.layers.recognise_parts import NotRecognised, Part, Scope

# Tried in this order; each returns None if the layer does not have its sub-modules at all.
FAMILIES: tuple[tuple[str, Callable[[Scope], Part | None]], ...] = (
    ("gated MLP", blocks.gated_mlp),
    ("decoder block", blocks.decoder_block),
    ("post-norm encoder block", blocks.post_norm_block),
    ("pre-norm block", blocks.pre_norm_block),
    ("two-layer MLP", blocks.plain_mlp),
)


@dataclass(frozen=True)
class Recipe:
    """How to build the program of a recognised layer.

    Attributes:
        family: what the layer was recognised as.
        part: the tree of parts; prints as such.
        zero_gradient: names of parameters whose gradient is zero by mathematics.
        sequences: whether tokens of an anchor interact, so that anchors must be [n, T, d].
    """

    family: str
    part: Part
    zero_gradient: frozenset[str]
    sequences: bool

    def build(self, materials: Materials) -> Node:
        """The program, with the tensors, precision and token count of ``materials``."""
        return self.part.build(materials)


def recognise(layer: nn.Module) -> Recipe:
    """The recipe of a layer.

    Raises:
        NotRecognised: with the reason, when no family fits or a parameter would be left out.
    """
    scope = Scope("", layer)
    for family, parse in FAMILIES:
        part = parse(scope)
        if part is None:
            continue
        mine, theirs = part.names(), [name for name, _ in layer.named_parameters()]
        left = sorted(set(theirs) - set(mine))
        if left:
            raise NotRecognised(f"it looks like a {family}, but has {', '.join(left[:4])} as well")
        return Recipe(family, part, frozenset(part.zero_gradient()), part.sequences())
    raise NotRecognised(f"{type(layer).__name__} has the structure of no known block or MLP")


def zero_gradient_names(layer: nn.Module) -> frozenset[str]:
    """Parameters of a layer whose gradient is identically zero; none known if not recognised."""
    try:
        return recognise(layer).zero_gradient
    except NotRecognised:
        return frozenset()
