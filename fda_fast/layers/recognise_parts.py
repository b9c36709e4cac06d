"""The parts recipes are made of: linear, norm, activation, attention and their combinations.

Each part is found in a module by a ``find`` function, knows the parameters it covers, and builds
its node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fda_fast.layers.activation import Activation
from fda_fast.layers.combinators import Residual, Sequential
from fda_fast.layers.gated import GatedActivation
from fda_fast.layers.linear import Linear
from fda_fast.layers.norm import LayerScale, Norm
from fda_fast.layers.parameter import Materials
from fda_fast.layers.program import Node
from fda_fast.ops.activation import KINDS
from fda_fast.ops.reference import activation as activations


class NotRecognised(Exception):
    """A layer no program is known for; the message says why."""


@dataclass(frozen=True)
class Scope:
    """A sub-module and the prefix of its parameters in the layer's ``named_parameters()``."""

    prefix: str
    module: nn.Module

    def child(self, *aliases: str) -> Scope | None:
        """The first sub-module of these names (dots allowed) that exists, or None.

        An nn.Identity stands for a part the block was built without.
        """
        for alias in aliases:
            try:
                module = self.module.get_submodule(alias)
            except AttributeError:
                continue
            if not isinstance(module, nn.Identity):
                return Scope(f"{self.prefix}{alias}.", module)
        return None

    def has(self, *names: str) -> bool:
        """Whether every one of these sub-modules exists."""
        return all(self.child(name) is not None for name in names)

    def parameter(self, name: str) -> str | None:
        """Full name of the module's own parameter, or None if it has none of this name."""
        if getattr(self.module, name, None) is None:
            return None
        return f"{self.prefix}{name}"

    def attribute(self, *aliases: str, default: Any = None) -> Any:
        """The first of these attributes that exists and is not None."""
        for alias in aliases:
            value = getattr(self.module, alias, None)
            if value is not None:
                return value
        return default


class Part:
    """A piece of a recipe."""

    def names(self) -> list[str]:
        """The parameters it covers."""
        return []

    def zero_gradient(self) -> list[str]:
        """Those of them whose gradient is zero by mathematics."""
        return []

    def sequences(self) -> bool:
        """Whether the tokens of an anchor interact in it."""
        return False

    def build(self, materials: Materials) -> Node:
        """The node."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chain(Part):
    """Parts one after the other."""

    parts: tuple[Part, ...]

    def names(self) -> list[str]:
        """See ``Part.names``."""
        return [name for part in self.parts for name in part.names()]

    def zero_gradient(self) -> list[str]:
        """See ``Part.zero_gradient``."""
        return [name for part in self.parts for name in part.zero_gradient()]

    def sequences(self) -> bool:
        """See ``Part.sequences``."""
        return any(part.sequences() for part in self.parts)

    def build(self, materials: Materials) -> Node:
        """See ``Part.build``."""
        return Sequential([part.build(materials) for part in self.parts])


class Around(Chain):
    """A residual connection around the chain."""

    def build(self, materials: Materials) -> Node:
        """See ``Part.build``."""
        return Residual(super().build(materials))


def chain(*parts: Part | None) -> Chain:
    """The parts that exist, one after the other."""
    return Chain(tuple(part for part in parts if part is not None))


def around(*parts: Part | None) -> Around:
    """x + the parts that exist, one after the other."""
    return Around(tuple(part for part in parts if part is not None))


@dataclass(frozen=True)
class LinearPart(Part):
    """Linear layers that share their input: (weight, bias or None) names of every segment."""

    segments: tuple[tuple[str, str | None], ...]
    outputs: tuple[int, ...]
    transposed: bool = False
    without_gradient: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """See ``Part.names``."""
        return [name for pair in self.segments for name in pair if name is not None]

    def zero_gradient(self) -> list[str]:
        """See ``Part.zero_gradient``."""
        return list(self.without_gradient)

    def build(self, materials: Materials) -> Node:
        """See ``Part.build``."""
        weights = [
            materials.parameter(weight, transposed=self.transposed) for weight, _ in self.segments
        ]
        biases = [
            None
            if bias is None
            else materials.parameter(bias, zero_gradient=bias in self.without_gradient)
            for _, bias in self.segments
        ]
        return Linear(weights, biases, materials.precision)


def find_linear(*scopes: Scope | None) -> LinearPart:
    """Linear layers on the same input, packed in this order.

    Raises:
        NotRecognised: one is missing or no plain linear layer (quantised, an adapter's wrapper).
    """
    segments, outputs, transposed = [], [], set()
    for scope in scopes:
        if scope is None:
            raise NotRecognised("a linear layer is missing where its block has one")
        weight = getattr(scope.module, "weight", None)
        known = {"weight", "bias"} >= {name for name, _ in scope.module.named_parameters()}
        # GPT-2's Conv1D is a linear layer with its weight stored as [in, out].
        conv1d = type(scope.module).__name__ == "Conv1D" and hasattr(scope.module, "nf")
        linear = isinstance(scope.module, nn.Linear) or conv1d
        if weight is None or not linear or not known or weight.dim() != 2:
            raise NotRecognised(f"{scope.prefix[:-1]} is a {type(scope.module).__name__}")
        segments.append((f"{scope.prefix}weight", scope.parameter("bias")))
        outputs.append(weight.shape[1] if conv1d else weight.shape[0])
        transposed.add(conv1d)
    if len(transposed) > 1:
        raise NotRecognised("linear layers of both orientations share an input")
    return LinearPart(tuple(segments), tuple(outputs), transposed.pop())


@dataclass(frozen=True)
class NormPart(Part):
    """LayerNorm ("layer") or RMSNorm ("rms"); offset 1 for Gemma's 1 + weight."""

    kind: str
    weight: str | None
    bias: str | None
    eps: float
    offset: float = 0.0

    def names(self) -> list[str]:
        """See ``Part.names``."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def build(self, materials: Materials) -> Node:
        """See ``Part.build``."""
        weight = bias = None
        if self.weight is not None:
            weight = materials.parameter(self.weight, offset=self.offset)
        if self.bias is not None:
            bias = materials.parameter(self.bias)
        return Norm(self.kind, weight, bias, self.eps)


def find_norm(scope: Scope | None, width: int | None = None) -> NormPart:
    """A norm, told apart by what it does to one random row.

    Raises:
        NotRecognised: missing, over more than the last dimension, of another width than
            ``width``, or neither LayerNorm nor RMSNorm.
    """
    if scope is None:
        raise NotRecognised("a norm is missing where its block has one")
    module = scope.module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = scope.attribute("eps", "variance_epsilon")
    if weight is None or weight.dim() != 1 or eps is None or width not in (None, len(weight)):
        raise NotRecognised(f"{scope.prefix[:-1]} is no LayerNorm or RMSNorm of known shape")
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, len(weight), generator=generator).to(weight)
    with torch.no_grad():
        y = module(row).double()
    w, row = weight.detach().double(), row.double()
    b = 0.0 if bias is None else bias.detach().double()
    centred = row - row.mean()
    layer = centred * (centred.square().mean() + eps).rsqrt() * w + b
    plain = row * (row.square().mean() + eps).rsqrt()
    # Far above float32 rounding, far below the difference between the candidates.
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    for kind, offset, expected in (
        ("layer", 0.0, layer),
        ("rms", 0.0, plain * w + b),
        ("rms", 1.0, plain * (1 + w) + b),
    ):
        if torch.allclose(y, expected, rtol=tolerance, atol=tolerance):
            return NormPart(
                kind, f"{scope.prefix}weight", scope.parameter("bias"), float(eps), offset
            )
    raise NotRecognised(f"{scope.prefix[:-1]} ({type(module).__name__}) is no norm known here")


@dataclass(frozen=True)
class ActivationPart(Part):
    """An elementwise activation, or a gated one on [gate | up]."""

    kind: str
    gated: bool = False

    def build(self, materials: Materials) -> Node:
        """See ``Part.build``."""
        return GatedActivation(self.kind) if self.gated else Activation(self.kind)


def find_activation(function: Callable[[Tensor], Tensor] | None, *, gated: bool) -> ActivationPart:
    """An activation, told by its values; names differ between libraries, functions do not.

    Raises:
        NotRecognised: missing, with parameters, or none of the known functions.
    """
    if function is None:
        raise NotRecognised("no activation was found")
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        raise NotRecognised(f"activation {type(function).__name__} has parameters")
    probe = torch.linspace(-15, 15, 301, dtype=torch.float64)
    with torch.no_grad():
        values = function(probe.clone())
    for kind in KINDS:
        # Implementations of the same function differ by printed digits of their constants.
        if torch.allclose(values, activations.value(kind, probe), rtol=0, atol=1e-8):
            return ActivationPart(kind, gated)
    name = getattr(function, "__name__", type(function).__name__)
    raise NotRecognised(f"activation {name} is not one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class ScalePart(Part):
    """LayerScale: a factor per column."""

    gamma: str

    def names(self) -> list[str]:
        """See ``Part.names``."""
        return [self.gamma]

    def build(self, materials: Materials) -> Node:
        """See ``Part.build``."""
        return LayerScale(materials.parameter(self.gamma))


def find_scale(scope: Scope | None) -> ScalePart | None:
    """A LayerScale; None if there is none or it is an Identity.

    Raises:
        NotRecognised: parameters other than one factor per column.
    """
    if scope is None:
        return None
    parameters = list(scope.module.named_parameters())
    if not parameters:
        return None
    name, gamma = parameters[0]
    if len(parameters) > 1 or gamma.dim() != 1:
        raise NotRecognised(f"{scope.prefix[:-1]} is no LayerScale")
    return ScalePart(f"{scope.prefix}{name}")
