"""Linear: y = x W^T + c, with task vectors T and t_c, fine-tuned weights W_f = W + T.

    forward   y = x W^T + c              dy = x T^T + dx W_f^T + t_c
    backward  g_x = g W                  G = g^T x,  G_c = sum_r g
    tangent   t_y = t W^T + x M^T + M_c  x M^T = alpha x T^T + beta x G^T
    reverse   S_x = S W + (b + alpha g) T + beta g G,   b_x = b W_f

Where T is known as B A with B [o, q], A [q, i] thin (LoRA experts), products with T and W_f are
products with W, which all tasks share, and with A and B: neither T nor W_f exists then.

M = alpha T + beta G is never formed: x T^T is there from the forward sweep, and alpha g T joins
b T. <G, T> = <g, x T^T> needs no pass over the weights.

G enters only through x G^T and g G, and there are two ways to compute those for R rows:

    direct    G = g^T x [o, i], then x G^T and g G           3 R i o multiplications
    Gram      (x x^T) g and (g g^T) x, through [R, R]        2 R^2 (i + o),
              |G|^2 = <x x^T, g g^T>

The one with fewer multiplications is taken; both give the same numbers. Where rows come in parts,
only the direct form adds up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.layers.parameter import Parameter
from fda_fast.layers.precision import Precision
from fda_fast.layers.program import Node
from fda_fast.ops import alignment, memory

# [R, R] products are smaller and run at a lower rate: the Gram form has to win by this factor.
_GRAM_MARGIN = 0.8
# Thin products run at a lower rate than square ones: factors have to win by this factor.
_FACTORED = 2


class _Sums(NamedTuple):
    """What the alignment needs of all rows."""

    along: Tensor  # [K, 1, S], <G_s, T_s>
    G: Tensor  # [K, o, i]
    G_c: Any  # [K, 1, o] or None


class _Direction(NamedTuple):
    """M, never formed: alpha T + beta G of every segment."""

    alpha: Tensor  # [K, S]
    beta: Tensor  # [K, S]
    G: Any  # operand [K, o, i], beta G; None in Gram form
    row: Any  # [K, o], M_c, or None


class Linear(Node):
    """One or several linear layers that share their input, packed along the output.

    Args:
        weights: one Parameter [o_s, i] per segment; o = sum of o_s.
        biases: one Parameter [o_s] or None per segment; None for no bias at all.
        precision: how products are computed.
        form: "auto", "direct" or "gram".
    """

    # Operands, read at the first forward.
    _W: Any  # [o, i]
    _T: Any  # [K, o, i]
    _W_f: Any  # [K, o, i], formed when first needed
    _B: Any  # [K, o, q] and [K, q, i] with T = B A, in place of T and W_f; or None
    _A: Any
    _c: Tensor | None  # [o]
    _t_c: Any  # [K, o] or None
    # Kept between sweeps; _op is the operand form.
    _x: Any  # [K, R, i], of an adaptation
    _dx: Any
    _x_op: Any
    _g: Any  # [K, R, o]
    _g_op: Any
    _xT: Any  # [K, R, o], x T^T
    _G: Any  # [K, o, i], until ``direction`` has it; None in Gram form
    _XX: Any  # [K, R, R], x x^T; Gram form only
    _GG: Any  # Gram form only: g_s g_s^T [K, R, R] of each segment, then their sum with beta_s
    _G_c: Any  # [K, 1, o]

    def __init__(
        self,
        weights: Sequence[Parameter],
        biases: Sequence[Parameter | None] | None,
        precision: Precision,
        form: str = "auto",
    ) -> None:
        if form not in ("auto", "direct", "gram"):
            raise InputError("form of a Linear", expected="auto, direct or gram", got=repr(form))
        self.weights = list(weights)
        self.biases = list(biases) if biases is not None else [None] * len(self.weights)
        self.precision = precision
        self.form = form
        self.widths = [weight.shape[0] for weight in self.weights]
        self.tasks = self.weights[0].tasks
        self._present = [bias for bias in self.biases if bias is not None]
        self._merged = self.weights[0].merged
        self._W = self._A = self._B = None
        self.release()

    def _read_values(self) -> None:
        self._W = self.precision.operand(_pack([w.value() for w in self.weights], 0))
        self._c = self._bias_rows(lambda bias: bias.value())

    def _read_deltas(self) -> None:
        self._W_f = None
        self._T = self._t_c = None
        if not self._merged:
            self._B, self._A = self._factors()
            if self._A is None:
                T = _pack([w.delta() for w in self.weights], 1)
                self._T = self.precision.operand(T)
            self._t_c = self._bias_rows(lambda bias: bias.delta())

    def _factors(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """B and A of all segments together, if known and cheaper than T; B is block-diagonal."""
        # Reduced precisions would round three times where T is rounded once.
        if self.precision.name != "fp32" or self.weights[0].master is not None:
            return None, None
        found = [weight.factors() for weight in self.weights]
        known = [pair for pair in found if pair is not None]
        rank = sum(pair[1].shape[1] for pair in known)
        width, inputs = sum(self.widths), self.weights[0].shape[1]
        if len(known) < len(found) or _FACTORED * rank * (width + inputs) > width * inputs:
            return None, None
        B = [torch.block_diag(*(left[k] for left, _ in known)) for k in range(self.tasks)]
        return torch.stack(B), _pack([right for _, right in known], 1)

    def _bias_rows(self, read: Callable[[Parameter], Tensor]) -> Tensor | None:
        """The segments' bias tensors side by side, zero where a segment has none."""
        if not self._present:
            return None
        like = read(self._present[0])
        rows = [
            like.new_zeros((*like.shape[:-1], width)) if bias is None else read(bias)
            for bias, width in zip(self.biases, self.widths, strict=True)
        ]
        return _pack(rows, -1)

    def _tuned_weight(self) -> Tensor:
        if self._merged:
            return self._W.unsqueeze(0)
        if self._W_f is None:
            self._W_f = self.precision.operand(_pack([w.tuned() for w in self.weights], 1))
        return self._W_f

    def parameters(self) -> list[Parameter]:
        """The weights of all segments, then the biases that exist."""
        return [*self.weights, *self._present]

    def refresh(self) -> None:
        """See ``Node.refresh``."""
        if self._merged or self._W is None:
            self._read_values()
        self._read_deltas()

    def release(self) -> None:
        """See ``Node.release``."""
        self._x = self._dx = self._g = self._xT = self._XX = self._GG = None
        self._x_op = self._g_op = self._G = self._G_c = self.direction = None

    def _shared(self, a: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
        """a [K, R, .] times a matrix that all tasks share; added to ``out`` if given."""
        rows = a.flatten(0, 1)
        if out is not None:
            self.precision.accumulate(out.flatten(0, 1), rows, W)
            return out
        out = memory.empty((*a.shape[:2], W.shape[1]), self._like)
        self.precision.matmul(rows, W, out.flatten(0, 1))
        return out

    def _batched(self, a: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
        """a [K, m, k] times B [K, k, n]; added to ``out`` if given."""
        if out is not None:
            return self.precision.accumulate(out, a, B)
        out = memory.empty((a.shape[0], a.shape[1], B.shape[2]), self._like)
        return self.precision.matmul(a, B, out)

    def _along_T(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """a [K, R, i] times T^T; added to ``out`` if given."""
        if self._A is None:
            return self._batched(a, self._T.mT, out)
        return self._batched(self._batched(a, self._A.mT), self._B.mT, out)

    def _back_T(self, a: Tensor, out: Tensor) -> Tensor:
        """a [K, R, o] times T, added to ``out``."""
        if self._A is None:
            return self._batched(a, self._T, out)
        return self._batched(self._batched(a, self._B), self._A, out)

    def _along_tuned(self, a: Tensor, out: Tensor) -> Tensor:
        """a [K, R, i] times W_f^T, added to ``out``."""
        if self._A is None:
            return self._batched(a, self._tuned_weight().mT, out)
        return self._along_T(a, self._shared(a, self._W.t(), out))

    def _back_tuned(self, a: Tensor) -> Tensor:
        """a [K, R, o] times W_f."""
        if self._A is None:
            return self._batched(a, self._tuned_weight())
        return self._back_T(a, self._shared(a, self._W))

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        if self._W is None:
            self.refresh()
        self._like = x.new_empty(0)  # dtype and device of the results of products
        self._x_op = self.precision.operand(x)
        if self._c is None:
            y = self._shared(self._x_op, self._W.t())
        else:
            y = memory.empty((*x.shape[:2], self._W.shape[0]), x).copy_(self._c)
            self._shared(self._x_op, self._W.t(), y)
        if self.weights[0].master is not None:
            self._x, self._dx = x, None if self._merged else dx
        return y, self._forward_difference(dx)

    def _forward_difference(self, dx: Tensor | None) -> Tensor | None:
        if self._merged:
            return None
        dy = self._xT = self._along_T(self._x_op)
        if self._t_c is not None:
            dy = torch.add(dy, self._t_c.unsqueeze(1), out=memory.empty(dy.shape, dy))
        if dx is not None:
            if dy is self._xT:
                dy = memory.empty(dy.shape, dy).copy_(dy)
            self._along_tuned(self.precision.operand(dx), dy)
        return dy

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.backward``."""
        self._g, self._g_op = g, self.precision.operand(g)
        if self._present:
            self._G_c = g.sum(1, keepdim=True)
        return self._shared(self._g_op, self._W) if need_input else None

    def _values_of_g(self) -> Tensor:
        g = self._g_op
        return memory.empty(g.shape, self._like).copy_(g) if self._g is None else self._g

    def _use_gram(self, rows: int) -> bool:
        o, i = self._W.shape
        return gram_is_cheaper(rows, i, o) if self.form == "auto" else self.form == "gram"

    def gather(self, total: _Sums | None) -> _Sums:
        """See ``Node.gather``."""
        along = alignment.dots(self._g, self._xT, self._xT, self.widths)[0].unsqueeze(1)
        G = self._direct_G(None if total is None else total.G)
        if total is None:
            return _Sums(along, G, self._G_c)
        G_c = None if self._G_c is None else total.G_c + self._G_c
        return _Sums(total.along + along, G, G_c)

    def terms(self, total: _Sums | None = None) -> list[alignment.Term]:
        """See ``Node.terms``; <G_s, T_s> = <g_s, (x T^T)_s>."""
        count = len(self.weights)
        if total is None:
            along = alignment.Term(self._g, self._xT, None, self.widths, range(count))
            gram = self._use_gram(self._g.shape[1])
            squares = self._gram_squares() if gram else self._squares(self._direct_G())
        else:
            # Summed over the parts already, so each is its own only summand.
            ones = torch.ones_like(total.along)
            along = alignment.Term(total.along, ones, None, [1] * count, range(count))
            squares, self._G_c = self._squares(total.G), total.G_c
        return [along, *squares, *self._bias_terms(self._t_c, count)]

    def _bias_terms(self, t_c: Tensor | None, first: int) -> list[alignment.Term]:
        """Of the biases that exist, numbered from ``first``, and their task vectors [K, o]."""
        if t_c is None:
            return []
        numbers = itertools.count(first)
        where = [None if bias is None else next(numbers) for bias in self.biases]
        return [alignment.Term(self._G_c, t_c.unsqueeze(1), self._G_c, self.widths, where)]

    def _direct_G(self, total: Tensor | None = None) -> Tensor:
        """G = g^T x [K, o, i] of the rows at hand; added to ``total`` if given."""
        return self._batched(self._g_op.mT, self._x_op, total)

    def _squares(self, G: Tensor) -> list[alignment.Term]:
        """|G_s|^2 from G itself."""
        self._G = G
        parts = enumerate(G.split(self.widths, dim=1))
        return [alignment.Term(part, None, part, [part.shape[2]], [s]) for s, part in parts]

    def _gram_squares(self) -> list[alignment.Term]:
        """|G_s|^2 = <x x^T, g_s g_s^T>."""
        self._XX = XX = self._batched(self._x_op, self._x_op.mT)
        parts = self._g_op.split(self.widths, dim=2)
        self._GG = [self._batched(part, part.mT) for part in parts]
        return [alignment.Term(XX, None, GG, [XX.shape[2]], [s]) for s, GG in enumerate(self._GG)]

    def set_coefficients(self, coefficients: Tensor) -> None:
        """See ``Node.set_coefficients``; G, or g_s g_s^T, is multiplied by beta here."""
        alpha, beta = coefficients[:, :, : len(self.weights)]
        G, self._G = self._G, None
        if G is not None:
            for s, part in enumerate(G.split(self.widths, dim=1)):
                part.mul_(beta[:, s, None, None])
            G = self.precision.operand(G)
        else:
            first, *others = self._GG
            first.mul_(beta[:, 0, None, None])
            for s, GG in enumerate(others, start=1):
                first.addcmul_(GG, beta[:, s, None, None])
            self._GG = self.precision.operand(first)
        of_biases = coefficients[:, :, len(self.weights) :]
        row = self._bias_tangent(of_biases, self._t_c) if self._present else None
        self.direction = _Direction(alpha, beta, G, row)

    def _bias_tangent(self, coefficients: Tensor, t_c: Tensor) -> Tensor:
        """M_c [K, o] of the biases' coefficients and task vectors [K, o]; zero without a bias."""
        found = iter(coefficients.unbind(2))
        zero = coefficients.new_zeros(coefficients.shape[:2])
        columns = [zero if bias is None else next(found) for bias in self.biases]
        alpha, beta = torch.stack(columns, dim=2)
        return alignment.mix(alpha, t_c.unsqueeze(1), beta, self._G_c, self.widths).squeeze(1)

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        operand = self.precision.operand
        alpha, beta, G, row = self.direction
        if self.precision.narrow:
            self._g = None  # the dots are taken; what else is formed of it is rounded anyway
        zero = torch.zeros_like(alpha)
        out = alignment.mix(alpha, self._xT, zero, self._xT, self.widths, row)
        self._xT = None
        if G is not None:
            self._batched(self._x_op, G.mT, out)
            self._x_op = None
        else:
            g_op = self._g_op
            if len(self.weights) == 1:
                self._XX.mul_(beta[:, 0, None, None])
            else:
                g = self._values_of_g()
                g_op = operand(alignment.mix(zero, g, beta, g, self.widths))
            self._batched(operand(self._XX), g_op, out)
            self._XX = None
        if t is not None:
            self._shared(operand(t), self._W.t(), out)
        return out

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``."""
        operand = self.precision.operand
        alpha, _, G, _ = self.direction
        S_x = self._shared(operand(S), self._W)
        if G is not None:
            self._batched(self._g_op, G, S_x)
        else:
            self._batched(self._GG, self._x_op, S_x)
        merged = alignment.mix(torch.ones_like(alpha), b, alpha, self._values_of_g(), self.widths)
        self._back_T(operand(merged), S_x)
        self.release()
        return S_x, self._back_tuned(operand(b)) if need_b else None

    def adjoint(self, b: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.adjoint``."""
        operand, rows = self.precision.operand, self._W.shape[1]
        x_f = operand(self._x if self._dx is None else self._x + self._dx).view(-1, rows)
        b_op = operand(b)
        parts = b_op.flatten(0, 1).split(self.widths, dim=1)
        for weight, part in zip(self.weights, parts, strict=True):
            # In the layout of the module, whose transpose a Conv1D stores.
            a, b_s = (x_f.t(), part) if weight.transposed else (part.t(), x_f)
            if weight.adds:
                self.precision.accumulate(weight.grad, a, b_s)
            else:
                self.precision.matmul(a, b_s, weight.grad)
        if self._present:
            for bias, part in zip(self.biases, b.sum((0, 1)).split(self.widths), strict=True):
                if bias is not None:
                    bias.receive(part)
        self.release()
        return self._batched(b_op, self._tuned_weight()) if need_input else None


def gram_is_cheaper(rows: int, inputs: int, outputs: int) -> bool:
    """Whether the Gram form of a Linear [outputs, inputs] needs fewer operations for R rows."""
    return 2 * rows * rows * (inputs + outputs) < _GRAM_MARGIN * 3 * rows * inputs * outputs


def _pack(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
