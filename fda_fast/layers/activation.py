"""Activation: y = phi(x), elementwise."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.layers.program import Node
from fda_fast.ops import activation


class Activation(Node):
    """An elementwise activation; kinds as in ``fda_fast.ops.activation.KINDS``."""

    op: ModuleType = activation
    # Kept between sweeps: [K, R, d] or None.
    _x: Any
    _dx: Any
    _g: Any
    _t: Any

    def __init__(self, kind: str) -> None:
        if kind not in activation.KINDS:
            raise InputError("activation", expected=f"one of {activation.KINDS}", got=repr(kind))
        self.kind = kind
        self.release()

    def release(self) -> None:
        """See ``Node.release``."""
        self._x = self._dx = self._g = self._t = None

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        self._x, self._dx = x, dx
        return self.op.forward(self.kind, x, dx)

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.backward``."""
        if not need_input:
            return None
        self._g = g
        return self.op.backward(self.kind, self._x, g)

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        self._t = t
        return None if t is None else self.op.tangent(self.kind, self._x, t)

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``."""
        x, dx, g, t = self._x, self._dx, self._g, self._t
        self.release()
        return self.op.reverse(self.kind, x, dx, g, t, S, b, need_b)

    def adjoint(self, b: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.adjoint``."""
        x, dx = self._x, self._dx
        self.release()
        return self.op.adjoint(self.kind, x, dx, b) if need_input else None
