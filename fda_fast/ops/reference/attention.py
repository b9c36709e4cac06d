"""Attention in four sweeps, in torch: the definition.

Score matrices are [B, Q, T] with B = N * key_value heads and Q = (query / key_value) * T rows: the
query heads that share a key head are stacked, so that grouped queries are plain products and the
cotangent of a key head sums over its group by itself.

Rows of P sum to one, and rows of dP, of tP and of every score cotangent sum to zero. Hence a vector
common to all keys, or to all values, of a sequence drops out of every product but y = P v, and is
taken off beforehand: in low precision a common part (a bias, for instance) would drown the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fda_fast.ops.attention import Heads

# Score differences above which exp is no longer safe; the plain difference is accurate there.
_LARGE = 20.0


class _Plain:
    """Products in the dtype of their operands."""

    @staticmethod
    def operand(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)


class _Layout:
    """Packed rows to heads and back."""

    def __init__(self, heads: Heads, rope: tuple[Tensor, Tensor] | None) -> None:
        self.heads = heads
        self.rope = rope
        self.group = heads.query // heads.key_value

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, T, packed] -> q [B, Q, size], k and v [B, T, size]."""
        heads = self.heads
        n, tokens, _ = x.shape
        x = x.view(n, tokens, -1, heads.size)
        q, k, v = x.split([heads.query, heads.key_value, heads.key_value], dim=2)
        if self.rope is not None:
            q, k = self._rotate(q), self._rotate(k)
        return self._stack_queries(q), self._stack(k), self._stack(v)

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Transpose of ``split`` on cotangents: heads back into packed rows."""
        q, k, v = self._unstack_queries(q, k.shape[1]), self._unstack(k), self._unstack(v)
        if self.rope is not None:
            q, k = self._rotate_back(q), self._rotate_back(k)
        return torch.cat([q, k, v], dim=2).flatten(2)

    def split_output(self, y: Tensor) -> Tensor:
        """[N, T, query * size] -> [B, Q, size]."""
        n, tokens, _ = y.shape
        return self._stack_queries(y.view(n, tokens, self.heads.query, self.heads.size))

    def join_output(self, y: Tensor, tokens: int) -> Tensor:
        """[B, Q, size] -> [N, T, query * size]."""
        return self._unstack_queries(y, tokens).flatten(2)

    def _stack(self, k: Tensor) -> Tensor:
        return k.transpose(1, 2).flatten(0, 1)

    def _unstack(self, k: Tensor) -> Tensor:
        return k.unflatten(0, (-1, self.heads.key_value)).transpose(1, 2)

    def _stack_queries(self, q: Tensor) -> Tensor:
        n, tokens, _, size = q.shape
        q = q.reshape(n, tokens, self.heads.key_value, self.group, size).permute(0, 2, 3, 1, 4)
        return q.reshape(n * self.heads.key_value, self.group * tokens, size)

    def _unstack_queries(self, q: Tensor, tokens: int) -> Tensor:
        q = q.view(-1, self.heads.key_value, self.group, tokens, self.heads.size)
        return q.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _rotate(self, u: Tensor) -> Tensor:
        cos, sin, head, tail = self._rotary_parts(u)
        half = head.shape[-1] // 2
        turned = torch.cat([-head[..., half:], head[..., :half]], dim=-1)
        return torch.cat([head * cos + turned * sin, tail], dim=-1)

    def _rotate_back(self, u: Tensor) -> Tensor:
        cos, sin, head, tail = self._rotary_parts(u)
        half = head.shape[-1] // 2
        weighed = head * sin
        turned = torch.cat([weighed[..., half:], -weighed[..., :half]], dim=-1)
        return torch.cat([head * cos + turned, tail], dim=-1)

    def _rotary_parts(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = (table.to(u.dtype)[:, None] for table in self.rope)
        return cos, sin, u[..., : cos.shape[-1]], u[..., cos.shape[-1] :]


def hidden(heads: Heads, tokens: int, device: torch.device) -> Tensor | None:
    """[Q, T], True where a query may not look; None if it may look everywhere."""
    if not heads.causal:
        return None
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    mask = distance < 0
    if heads.window is not None:
        mask = mask | (distance >= heads.window)
    return mask.repeat(heads.query // heads.key_value, 1)


def softmax_difference(S: Tensor, dS: Tensor, P: Tensor) -> Tensor:
    """softmax(S + dS) - softmax(S) over the last dimension, without cancellation; P = softmax(S).

    With dS centred on its mean under P, e = expm1(dS) and m = sum P e >= 0, the difference is
    P (e - m) / (1 + m). Rows whose scores move by more than 20 take the plain difference, which
    loses nothing there.
    """
    centred = dS - (P * dS).sum(-1, keepdim=True)
    reach = centred.amax(-1, keepdim=True)
    e = torch.expm1(centred.clamp_max(_LARGE))
    m = (P * e).sum(-1, keepdim=True)
    small = P * (e - m) / (1 + m)
    return torch.where(reach < _LARGE, small, torch.softmax(S + dS, -1) - P)


def forward(
    x: Tensor,
    dx: Tensor | None,
    heads: Heads,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    precision: Any = None,
) -> tuple[Tensor, Tensor | None, Sweeps]:
    """See ``fda_fast.ops.attention.forward``."""
    sweeps = Sweeps(x, dx, heads, rope, precision if precision is not None else _Plain)
    y, dy = sweeps.forward()
    return y, dy, sweeps


class Sweeps:
    """One evaluation. Capital letters are score matrices [B, Q, T]; prefix d is f minus 0.

    What starts with d is None throughout if dx is None.
    """

    def __init__(
        self,
        x: Tensor,
        dx: Tensor | None,
        heads: Heads,
        rope: tuple[Tensor, Tensor] | None,
        precision: Any,
    ) -> None:
        self.heads, self.tokens = heads, x.shape[1]
        self.layout = _Layout(heads, rope)
        self.precision = precision
        self.q, k, v = self.layout.split(x)
        self.v_mean = v.mean(1, keepdim=True)
        self.k, self.v = self._centre_keys(k), v - self.v_mean
        self.dq = self.dk = self.dv = self.dP = None
        if dx is not None:
            self.dq, dk, dv = self.layout.split(dx)
            self.dv_mean = dv.mean(1, keepdim=True)
            self.dk, self.dv = self._centre_keys(dk), dv - self.dv_mean

    def _centre_keys(self, k: Tensor) -> Tensor:
        # Under a softcap a common part of the scores does not drop out.
        return k if self.heads.softcap is not None else k - k.mean(1, keepdim=True)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return self.precision.matmul(self.precision.operand(a), self.precision.operand(b))

    def _scores(self, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
        """Sum of a b^T over pairs (a [B, Q, size], b [B, T, size] or None), as one product."""
        pairs = [pair for pair in pairs if pair[1] is not None]
        a = torch.cat([a for a, _ in pairs], -1) if len(pairs) > 1 else pairs[0][0]
        b = torch.cat([b for _, b in pairs], -1) if len(pairs) > 1 else pairs[0][1]
        return self._product(a, b.transpose(1, 2))

    def _mix(self, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
        """Sum of A b over pairs (A [B, Q, T], b [B, T, size] or None)."""
        return sum(self._product(A, b) for A, b in pairs if b is not None)

    def _mix_back(self, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Sum of A^T b over pairs (A [B, Q, T], b [B, Q, size]), either of them possibly None."""
        return sum(
            self._product(A.transpose(1, 2), b) for A, b in pairs if A is not None and b is not None
        )

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """y and dy, each [N, T, query * size]."""
        mask = hidden(self.heads, self.tokens, self.q.device)
        S = self._scores((self.q, self.k)) * self.heads.scale
        if self.dq is None:
            self._weigh(S, mask)
        else:
            self._weigh_both(S, mask)
        y = self._mix((self.P, self.v)) + self._spread(self.v_mean)
        y = self.layout.join_output(y, self.tokens)
        if self.dq is None:
            return y, None
        dy = self._mix((self.dP, self.v), (self.P + self.dP, self.dv)) + self._spread(self.dv_mean)
        return y, self.layout.join_output(dy, self.tokens)

    def _weigh(self, S: Tensor, mask: Tensor | None) -> None:
        """P from the raw scores, where nothing differs."""
        if self.heads.softcap is not None:
            self.tanh = self.tanh_f = torch.tanh(S / self.heads.softcap)
            self.dtanh = torch.zeros_like(S)
            S = self.heads.softcap * self.tanh
        self.P = torch.softmax(S if mask is None else S.masked_fill(mask, -torch.inf), -1)

    def _weigh_both(self, S: Tensor, mask: Tensor | None) -> None:
        """P and dP from the raw scores."""
        scale, cap = self.heads.scale, self.heads.softcap
        dS = self._scores((self.dq, self.k), (self.q + self.dq, self.dk)) * scale
        if cap is not None:
            # tanh(a + d) - tanh(a) = tanh(d) (1 - tanh(a) tanh(a + d))
            self.tanh, self.tanh_f = torch.tanh(S / cap), torch.tanh((S + dS) / cap)
            self.dtanh = torch.tanh(dS / cap) * (1 - self.tanh * self.tanh_f)
            S, dS = cap * self.tanh, cap * self.dtanh
        if mask is not None:
            S, dS = S.masked_fill(mask, -torch.inf), dS.masked_fill(mask, 0)
        self.P = torch.softmax(S, -1)
        self.dP = softmax_difference(S, dS, self.P)

    def _spread(self, mean: Tensor) -> Tensor:
        return mean.expand(-1, self.layout.group * self.tokens, -1)

    def backward(self, g: Tensor) -> Tensor:
        """g_x [N, T, packed]."""
        self.g = self.layout.split_output(g)
        A = self._scores((self.g, self.v))
        self.A = A - _mean(self.P, A)  # only the part off the mean acts on scores
        gR = self._score_cotangent()
        return self.layout.join(
            self._mix((gR, self.k)),
            self._mix_back((gR, self.q)),
            self._mix_back((self.P, self.g)),
        )

    def _score_cotangent(self) -> Tensor:
        """Cotangent of q k^T in the pretrained branch; recomputed rather than held."""
        return self._uncap(self.P * self.A) * self.heads.scale

    def tangent(self, t: Tensor) -> Tensor:
        """t_y [N, T, query * size]."""
        self.tq, tk, tv = self.layout.split(t)
        tv_mean = tv.mean(1, keepdim=True)
        self.tk, self.tv = self._centre_keys(tk), tv - tv_mean
        tR = self._scores((self.tq, self.k), (self.q, self.tk)) * self.heads.scale
        if self.heads.softcap is not None:
            self.tR = tR
        tS = self._uncap(tR)
        self.tS = tS - _mean(self.P, tS)
        y = self._mix((self.P * self.tS, self.v), (self.P, self.tv)) + self._spread(tv_mean)
        return self.layout.join_output(y, self.tokens)

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """(S_x, b_x), each [N, T, packed].

        W, the cotangent of the scores in S_x, gathers three parts of the same form
        P (Z - mean of Z): J^T S, the part of (J_f - J)^T b from v_f - v, and the second
        derivative; and the part of (J_f - J)^T b from P_f - P.
        """
        scale = self.heads.scale
        S, b = self.layout.split_output(S), self.layout.split_output(b)
        P_f = _sum(self.P, self.dP)
        A_f = self._scores((b, _sum(self.v, self.dv)))
        A_f = A_f - _mean(P_f, A_f)
        Z = self._scores((S, self.v), (b, self.dv), (self.g, self.tv)) + self.tS * self.A
        W = self.P * (Z - _mean(self.P, Z))
        if self.dP is not None:
            D = self.dP * A_f
            W += D - self.P * D.sum(-1, keepdim=True)
        bS = P_f * A_f
        W, bR = self._uncap_reverse(W, bS)
        W, bR, gR = W * scale, bR * scale, self._score_cotangent()
        S_x = self.layout.join(
            self._mix((W, self.k), (bR, self.dk), (gR, self.tk)),
            self._mix_back((W, self.q), (bR, self.dq), (gR, self.tq)),
            self._mix_back((self.P, S), (self.dP, b), (self.P * self.tS, self.g)),
        )
        return S_x, self._finetuned_cotangent(bR, P_f, b) if need_b else None

    def adjoint(self, b: Tensor) -> Tensor:
        """b_x [N, T, packed]."""
        b = self.layout.split_output(b)
        P_f = _sum(self.P, self.dP)
        A_f = self._scores((b, _sum(self.v, self.dv)))
        bS = P_f * (A_f - _mean(P_f, A_f))
        if self.heads.softcap is not None:
            bS = bS * (1 - self.tanh_f.square())
        return self._finetuned_cotangent(bS * self.heads.scale, P_f, b)

    def _finetuned_cotangent(self, bR: Tensor, P_f: Tensor, b: Tensor) -> Tensor:
        return self.layout.join(
            self._mix((bR, _sum(self.k, self.dk))),
            self._mix_back((bR, _sum(self.q, self.dq))),
            self._mix_back((P_f, b)),
        )

    def _uncap(self, A: Tensor) -> Tensor:
        """Times the derivative of the softcap, in the pretrained branch."""
        return A if self.heads.softcap is None else A * (1 - self.tanh.square())

    def _uncap_reverse(self, W: Tensor, bS: Tensor) -> tuple[Tensor, Tensor]:
        """Reverse sweep through the softcap c tanh(R / c): score cotangents (S, b) of R."""
        cap = self.heads.softcap
        if cap is None:
            return W, bS
        tanh, tanh_f = self.tanh, self.tanh_f
        slope = 1 - tanh.square()
        curvature = -2 / cap * tanh * slope
        change = -self.dtanh * (tanh + tanh_f)  # of the slope, f minus 0
        W = slope * W + change * bS + curvature * self.P * self.A * self.tR
        return W, bS * (1 - tanh_f.square())


def _mean(P: Tensor, A: Tensor) -> Tensor:
    """Row means of A under P, [B, Q, 1]."""
    return (P * A).sum(-1, keepdim=True)


def _sum(a: Tensor, da: Tensor | None) -> Tensor:
    return a if da is None else a + da
