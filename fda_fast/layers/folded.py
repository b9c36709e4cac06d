"""A Linear fed by a norm of the anchors themselves, folded into one operation on xh.

    y = (xh gamma + beta) W^T + c = xh W'^T + c',   W' = W diag(gamma),   c' = c + W beta

xh, the normalised input, is the same in both branches when the anchors are the norm's input, so
this is a Linear whose input has no difference: 7 products instead of 11. With R = g^T xh and
g_b = sum_r g, every gradient follows without another product:

    G_W = R diag(gamma) + g_b beta^T     G_gamma = sum_o W * R     G_beta = W^T g_b     G_c = g_b

and the tangent is one product with M' = M_W diag(gamma) + W diag(M_gamma), plus a constant row.
The folded task vector T' = T diag(gamma_f) + W diag(t_gamma) is formed without cancellation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fda_fast.layers.combinators import Residual, Sequential
from fda_fast.layers.linear import Linear
from fda_fast.layers.norm import Norm, vector_term
from fda_fast.layers.parameter import Parameter
from fda_fast.layers.program import Node
from fda_fast.ops import alignment, memory, norm


class _Sums(NamedTuple):
    """What the alignment needs of all rows."""

    R: list[Tensor]  # [K, o_s, i] of every segment
    G_c: Tensor  # [K, 1, o]


class _Direction(NamedTuple):
    """M' and the constant row of the tangent."""

    M: Tensor  # operand [K, o, i]
    row: Tensor  # [K, o]


class NormLinear(Linear):
    """``Sequential([norm, linear])`` at the input of a program; construction only."""

    _input: Any  # [K, R, i], the anchors
    _t_plain: Any  # [K, o] or None, the biases' own task vectors

    def __init__(self, first: Norm, linear: Linear) -> None:
        super().__init__(linear.weights, linear.biases, linear.precision)
        self.norm = first

    def parameters(self) -> list[Parameter]:
        """Those of the norm, then those of the Linear."""
        return [*self.norm.parameters(), *super().parameters()]

    def refresh(self) -> None:
        """Form the folded weights and task vectors."""
        self._T_s = [weight.delta() for weight in self.weights]  # [K, o_s, i]
        W, T = torch.cat([weight.value() for weight in self.weights]), torch.cat(self._T_s, dim=1)
        gamma, t_gamma = _both(self.norm.weight, T[:, 0], 1.0)  # [i], [K, i]
        beta, t_beta = _both(self.norm.bias, T[:, 0], 0.0)
        self._gamma, self._t_gamma = gamma, t_gamma
        self._beta, self._t_beta = beta, t_beta
        self._W_plain = W
        gamma_f = (gamma + t_gamma).unsqueeze(1)
        folded = torch.addcmul(W * t_gamma.unsqueeze(1), T, gamma_f)
        self._W, self._T = self.precision.operand(W * gamma), self.precision.operand(folded)
        self._t_plain = self._bias_rows(lambda bias: bias.delta())
        c = self._bias_rows(lambda bias: bias.value())
        shift = W @ beta
        self._c = shift if c is None else c + shift
        moved = (T @ (beta + t_beta).unsqueeze(2)).squeeze(2) + t_beta @ W.t()
        self._t_c = moved if self._t_plain is None else moved + self._t_plain

    def release(self) -> None:
        """See ``Node.release``."""
        super().release()
        self._input = None
        self._G_s: list[Tensor] = []

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        assert dx is None, "a folded norm reads the anchors, which both branches share"
        self._input = x
        xh, _ = norm.forward(self.norm.kind, x, None, None, None, None, None, self.norm.eps)
        y, dy = super().forward(xh, None)
        self._xT = None  # its gradient and tangent come from M' alone
        return y, dy

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.backward``; nothing before it has a parameter."""
        assert not need_input, "a folded norm is the first operation of a program"
        self._g_op = self.precision.operand(g)
        self._G_c = g.sum(1, keepdim=True)
        return None

    def gather(self, total: Any) -> Any:
        """See ``Node.gather``."""
        parts = self._g_op.split(self.widths, dim=2)
        before = [None] * len(parts) if total is None else total.R
        R = [self._batched(g.mT, self._x_op, R_s) for g, R_s in zip(parts, before, strict=True)]
        return _Sums(R, self._G_c if total is None else total.G_c + self._G_c)

    def terms(self, total: Any = None) -> list[alignment.Term]:
        """See ``Node.terms``."""
        R_s, self._G_c = self.gather(None) if total is None else total
        width = self._W_plain.shape[1]
        g_b = self._G_c.squeeze(1)  # [K, o]
        self._G_gamma = self._G_c.new_zeros((g_b.shape[0], width))
        self._G_beta = g_b @ self._W_plain
        parts = zip(
            R_s,
            self._W_plain.split(self.widths),
            g_b.split(self.widths, dim=1),
            strict=True,
        )
        for R, W, g_s in parts:
            product = torch.mul(R, W, out=memory.empty(R.shape, R))
            self._G_gamma += product.sum(1)
            self._G_s.append(R.mul_(self._gamma).addcmul_(g_s.unsqueeze(2), self._beta))
        found = [vector_term(G, T, p) for p, (G, T) in enumerate(self._norm_pairs())]
        first = len(found)
        of_weights = enumerate(zip(self._G_s, self._T_s, strict=True), start=first)
        found += [alignment.Term(G, T, G, [width], [p]) for p, (G, T) in of_weights]
        return found + self._bias_terms(self._t_plain, first + len(self.weights))

    def _norm_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(G, T), each [K, i], of the norm's parameters."""
        pairs = (
            (self.norm.weight, self._G_gamma, self._t_gamma),
            (self.norm.bias, self._G_beta, self._t_beta),
        )
        return [(G, T) for parameter, G, T in pairs if parameter is not None]

    def set_coefficients(self, coefficients: Tensor) -> None:
        """See ``Node.set_coefficients``."""
        count = len(self.norm.parameters())
        moved = iter(
            [
                alpha.unsqueeze(1) * T + beta.unsqueeze(1) * G
                for (alpha, beta), (G, T) in zip(
                    coefficients[:, :, :count].unbind(2), self._norm_pairs(), strict=True
                )
            ]
        )
        zero = self._G_beta.new_zeros(())
        m_gamma = zero if self.norm.weight is None else next(moved)
        m_beta = zero if self.norm.bias is None else next(moved)
        shape = self._G_beta.shape
        self.direction = self._form_direction(
            coefficients[:, :, count:], m_gamma.expand(shape), m_beta.expand(shape)
        )

    def _form_direction(self, coefficients: Tensor, m_gamma: Tensor, m_beta: Tensor) -> _Direction:
        """M' [K, o, i] and the constant row M_c + W m_beta + M_W beta [K, o]."""
        tasks, width = m_gamma.shape
        M = memory.empty((tasks, sum(self.widths), width), self._like)
        alphas, betas = coefficients[:, :, : len(self.weights)]
        rows = []
        for s, part in enumerate(M.split(self.widths, dim=1)):
            M_W = alignment.mix(
                alphas[:, s : s + 1], self._T_s[s], betas[:, s : s + 1], self._G_s[s], [width]
            )
            rows.append(M_W @ self._beta)
            torch.mul(M_W, self._gamma, out=part)
        self._G_s = []
        M.addcmul_(self._W_plain, m_gamma.unsqueeze(1))
        row = torch.cat(rows, dim=1) + m_beta @ self._W_plain.t()
        if self._present:
            row += self._bias_tangent(coefficients[:, :, len(self.weights) :], self._t_plain)
        return _Direction(self.precision.operand(M), row)

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        assert t is None, "a folded norm is the first operation of a program"
        out = memory.empty((*self._x_op.shape[:2], self._W.shape[0]), self._like)
        M, row = self.direction
        out.copy_(row.unsqueeze(1))
        self._batched(self._x_op, M.mT, out)
        self._x_op = None
        return out

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``."""
        assert not need_b, "a folded norm is the first operation of a program"
        operand = self.precision.operand
        S_xh = self._shared(operand(S), self._W)
        self._batched(operand(b), self._T, S_xh)
        self._batched(self._g_op, self.direction.M, S_xh)
        x = self._input
        self.release()
        return norm.reverse(
            self.norm.kind, x, None, None, None, S_xh, S_xh, None, None, None, self.norm.eps, False
        )


def fold_first_norm(root: Node) -> Node:
    """The program with a norm of the anchors and the Linear after it folded, if it starts so.

    The combinators that lead there are changed in place.
    """
    inside = root
    while True:
        if isinstance(inside, Residual):
            inside = inside.node
        elif isinstance(inside, Sequential) and isinstance(inside.nodes[0], Residual):
            inside = inside.nodes[0]
        else:
            break
    if isinstance(inside, Sequential) and len(inside.nodes) > 1:
        first, second = inside.nodes[:2]
        if type(first) is Norm and type(second) is Linear and first.parameters():
            inside.nodes[:2] = [NormLinear(first, second)]
    return root


def _both(parameter: Parameter | None, like: Tensor, default: float) -> tuple[Tensor, Tensor]:
    """Value [i] and task vectors [K, i] of a norm's parameter; constant and zero without one."""
    if parameter is None:
        return torch.full_like(like[0], default), torch.zeros_like(like)
    return parameter.value(), parameter.delta()
