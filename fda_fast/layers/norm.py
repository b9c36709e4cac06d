"""LayerNorm and RMSNorm, and the elementwise LayerScale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.layers.parameter import Parameter
from fda_fast.layers.program import Node
from fda_fast.ops import alignment, memory, norm


class _Elementwise(Node):
    """A node whose parameters [d] multiply or shift; their G is small enough to be kept."""

    # Values and task vectors; None for a parameter that does not exist.
    _w: Any  # [d]
    _c: Any  # [d]
    _tw: Any  # [K, d]
    _tb: Any  # [K, d]
    # Kept between sweeps: [K, R, d], then [K, d]; or None.
    _x: Any
    _dx: Any
    _g: Any
    _t: Any
    _Gw: Any
    _Gb: Any
    direction: Any  # (M of the weight, of the bias), each [K, d] or None

    def __init__(self, weight: Parameter | None, bias: Parameter | None) -> None:
        self.weight, self.bias = weight, bias
        self.refresh()
        self.release()

    def refresh(self) -> None:
        """See ``Node.refresh``."""
        self._w, self._c = (None if p is None else p.value() for p in (self.weight, self.bias))
        self._tw, self._tb = (
            None if p is None or p.merged else p.delta() for p in (self.weight, self.bias)
        )

    def parameters(self) -> list[Parameter]:
        """The weight, then the bias, as far as they exist."""
        return [p for p in (self.weight, self.bias) if p is not None]

    def release(self) -> None:
        """See ``Node.release``."""
        self._x = self._dx = self._g = self._t = None
        self._Gw = self._Gb = self.direction = None

    def gather(self, total: tuple[Any, Any] | None) -> tuple[Any, Any]:
        """See ``Node.gather``."""
        if total is None:
            return self._Gw, self._Gb
        pairs = zip(total, (self._Gw, self._Gb), strict=True)
        first, second = (None if G is None else before + G for before, G in pairs)
        return first, second

    def terms(self, total: tuple[Any, Any] | None = None) -> list[alignment.Term]:
        """See ``Node.terms``."""
        if total is not None:
            self._Gw, self._Gb = total
        pairs = [(G, T) for G, T in ((self._Gw, self._tw), (self._Gb, self._tb)) if G is not None]
        return [vector_term(G, T, p) for p, (G, T) in enumerate(pairs)]

    def set_coefficients(self, coefficients: Tensor) -> None:
        """See ``Node.set_coefficients``."""
        found = iter(coefficients.unbind(2))
        self.direction = tuple(
            None if G is None else _mix(next(found), T, G)
            for G, T in ((self._Gw, self._tw), (self._Gb, self._tb))
        )
        self._Gw = self._Gb = None


def vector_term(G: Tensor, T: Tensor, p: int) -> alignment.Term:
    """Of parameter p [d], whose G and task vectors are [K, d]."""
    G = G.unsqueeze(1)
    return alignment.Term(G, T.unsqueeze(1), G, [G.shape[2]], [p])


def _mix(coefficients: Tensor, T: Tensor, G: Tensor) -> Tensor:
    """M [K, d] from alpha, beta [2, K]."""
    alpha, beta = coefficients.unsqueeze(2)
    return torch.addcmul(alpha * T, beta, G)


class Norm(_Elementwise):
    """LayerNorm ("layer") or RMSNorm ("rms") over the last dimension.

    Args:
        kind: "layer" or "rms".
        weight: Parameter [d] or None (1); Gemma's 1 + w is a Parameter with offset 1.
        bias: Parameter [d] or None (0).
        eps: added to the mean square.
    """

    def __init__(
        self, kind: str, weight: Parameter | None, bias: Parameter | None, eps: float
    ) -> None:
        if kind not in ("layer", "rms"):
            raise InputError("norm", expected="layer or rms", got=repr(kind))
        self.kind, self.eps = kind, eps
        super().__init__(weight, bias)

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        self._x, self._dx = x, dx
        return norm.forward(self.kind, x, dx, self._w, self._c, self._tw, self._tb, self.eps)

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.backward``."""
        self._g = g
        weighted, biased = self.weight is not None, self.bias is not None
        g_x, self._Gw, self._Gb = norm.backward(
            self.kind, self._x, g, self._w, self.eps, need_input, weighted, biased
        )
        return g_x

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        self._t = t
        mw, mb = self.direction
        return norm.tangent(self.kind, self._x, t, self._w, mw, mb, self.eps)

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``."""
        x, dx, g, t, (mw, _) = self._x, self._dx, self._g, self._t, self.direction
        self.release()
        return norm.reverse(self.kind, x, dx, g, t, S, b, self._w, self._tw, mw, self.eps, need_b)

    def adjoint(self, b: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.adjoint``."""
        weighted, biased = self.weight is not None, self.bias is not None
        b_x, grad_w, grad_b = norm.adjoint(
            self.kind,
            self._x,
            self._dx,
            b,
            self._w,
            self._tw,
            self.eps,
            need_input,
            weighted,
            biased,
        )
        for parameter, grad in ((self.weight, grad_w), (self.bias, grad_b)):
            if parameter is not None and grad is not None:
                parameter.receive(grad.sum(0))
        self.release()
        return b_x


class LayerScale(_Elementwise):
    """y = x * gamma, gamma a Parameter [d] (DINOv2, CaiT)."""

    def __init__(self, gamma: Parameter) -> None:
        super().__init__(gamma, None)

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        self._x, self._dx = x, dx
        y = torch.mul(x, self._w, out=memory.empty(x.shape, x))
        if self._tw is None:
            return y, None
        tw = self._tw.unsqueeze(1)
        dy = torch.mul(x, tw, out=memory.empty(x.shape, x))
        return y, dy if dx is None else dy.addcmul_(dx, self._w + tw)

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.backward``."""
        self._g = g
        self._Gw = (g * self._x).sum(1)
        return torch.mul(g, self._w, out=memory.empty(g.shape, g)) if need_input else None

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        mw = self.direction[0].unsqueeze(1)
        out = torch.mul(self._x, mw, out=memory.empty(self._x.shape, self._x))
        return out if t is None else out.addcmul_(t, self._w)

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``."""
        tw, mw = self._tw.unsqueeze(1), self.direction[0].unsqueeze(1)
        S_x = torch.mul(S, self._w, out=memory.empty(S.shape, S))
        S_x.addcmul_(b, tw).addcmul_(self._g, mw)
        self.release()
        b_x = torch.mul(b, self._w + tw, out=memory.empty(b.shape, b)) if need_b else None
        return S_x, b_x

    def adjoint(self, b: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.adjoint``."""
        x_f = self._x if self._dx is None else self._x + self._dx
        assert self.weight is not None
        self.weight.receive((b * x_f).sum((0, 1)))
        self.release()
        w_f = self._w if self._tw is None else self._w + self._tw.unsqueeze(1)
        return torch.mul(b, w_f, out=memory.empty(b.shape, b)) if need_input else None
