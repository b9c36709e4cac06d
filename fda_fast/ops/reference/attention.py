"""Attention in four sweeps, in torch: the definition.

Score matrices are [B, Q, T] with B = N * key_value heads and Q = (query / key_value) * T rows: the
query heads that share a key head are stacked, so that grouped queries are plain products and the
cotangent of a key head sums over its group by itself.

Rows of P sum to one, and rows of dP, of tP and of every score cotangent sum to zero. Hence a vector
common to all keys, or to all values, of a sequence drops out of every product but y = P v, and is
taken off beforehand: in low precision a common part (a bias, for instance) would drown the rest.

Results go to pooled buffers and are worked on in place; a tensor that is still needed never is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fda_fast.ops import memory

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
    def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return torch.bmm(a, b, out=out)

    @staticmethod
    def accumulate(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return out.baddbmm_(a, b)


class _Layout:
    """Packed rows to heads and back."""

    def __init__(self, heads: Heads, rope: tuple[Tensor, Tensor] | None) -> None:
        self.heads = heads
        self.rope = rope
        self.group = heads.query // heads.key_value

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[N, T, packed] -> q [B, Q, size]; k, v [B, T, size] and v's mean, taken off.

        k's mean over T is taken off as well, unless there is a softcap, under which it matters.
        """
        heads = self.heads
        n, tokens, _ = x.shape
        x = x.view(n, tokens, -1, heads.size)
        if self.rope is not None:
            x = self._rotate(x)
        q, k, v = x.split([heads.query, heads.key_value, heads.key_value], dim=2)
        v_mean = v.mean(1, keepdim=True)
        k = self._stack(k, None if heads.softcap is not None else k.mean(1, keepdim=True))
        return self._stack_queries(q), k, self._stack(v, v_mean), v_mean.view(-1, 1, heads.size)

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Transpose of ``split`` on cotangents: heads back into packed rows [N, T, packed]."""
        heads, tokens = self.heads, k.shape[1]
        n = k.shape[0] // heads.key_value
        out = memory.empty((n, tokens, heads.packed // heads.size, heads.size), k)
        parts = out.split([heads.query, heads.key_value, heads.key_value], dim=2)
        parts[0].view(n, tokens, -1, self.group, heads.size).copy_(self._by_token(q, tokens))
        for part, u in zip(parts[1:], (k, v), strict=True):
            part.copy_(u.view(n, -1, tokens, heads.size).transpose(1, 2))
        if self.rope is not None:
            out = self._rotate(out, back=True)
        return out.flatten(2)

    def split_output(self, y: Tensor) -> Tensor:
        """[N, T, query * size] -> [B, Q, size]."""
        return self._stack_queries(y.view(*y.shape[:2], self.heads.query, self.heads.size))

    def join_output(self, y: Tensor, mean: Tensor, tokens: int) -> Tensor:
        """y [B, Q, size] + mean [B, 1, size] -> [N, T, query * size]."""
        y = self._by_token(y, tokens)
        mean = mean.view(y.shape[0], 1, -1, 1, self.heads.size)
        return torch.add(y, mean, out=memory.empty(y.shape, y)).flatten(2)

    def _by_token(self, q: Tensor, tokens: int) -> Tensor:
        """[B, Q, size] -> view [N, T, key_value, group, size]."""
        q = q.view(-1, self.heads.key_value, self.group, tokens, self.heads.size)
        return q.permute(0, 3, 1, 2, 4)

    def _stack(self, k: Tensor, mean: Tensor | None) -> Tensor:
        """[N, T, key_value, size] - mean -> [B, T, size]."""
        n, tokens, count, size = k.shape
        out = memory.empty((n, count, tokens, size), k)
        k = k.transpose(1, 2)
        if mean is None:
            out.copy_(k)
        else:
            torch.sub(k, mean.transpose(1, 2), out=out)
        return out.view(-1, tokens, size)

    def _stack_queries(self, q: Tensor) -> Tensor:
        n, tokens, _, size = q.shape
        out = memory.empty((n, self.heads.key_value, self.group, tokens, size), q)
        by_token = q.view(n, tokens, self.heads.key_value, self.group, size)
        out.copy_(by_token.permute(0, 2, 3, 1, 4))
        return out.view(-1, self.group * tokens, size)

    def _rotate(self, x: Tensor, back: bool = False) -> Tensor:
        """q and k heads of x [N, T, heads, size] times the rotation, or times its transpose.

        Forwards the halves (a, b) become (a cos - b sin, b cos + a sin); each half has tables of
        its own.
        """
        assert self.rope is not None
        cos, sin = (table.to(x.dtype)[:, None] for table in self.rope)
        half, width = cos.shape[-1] // 2, cos.shape[-1]
        from_b, from_a = -sin[..., :half], sin[..., half:]
        if back:
            from_b, from_a = from_a, from_b
        out = memory.empty(x.shape, x).copy_(x)
        turned = slice(0, self.heads.query + self.heads.key_value)
        a, b = x[:, :, turned, :half], x[:, :, turned, half:width]
        out[:, :, turned, :half].mul_(cos[..., :half]).addcmul_(b, from_b)
        out[:, :, turned, half:width].mul_(cos[..., half:]).addcmul_(a, from_a)
        return out


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
    e = torch.sub(dS, _mean(P, dS), out=memory.empty(dS.shape, dS))
    far = e.amax(-1, keepdim=True) >= _LARGE
    e.clamp_max_(_LARGE).expm1_()
    m = _mean(P, e)
    near = e.sub_(m).mul_(P).div_(1 + m)
    if S.device.type == "cpu" and not far.any():
        return near
    return torch.where(far, torch.softmax(S + dS, -1) - P, near)


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
        self.q, self.k, self.v, self.v_mean = self.layout.split(x)
        nothing: Any = None
        self.dq = self.dk = self.dv = self.dv_mean = self.dP = nothing
        if dx is not None:
            self.dq, self.dk, self.dv, self.dv_mean = self.layout.split(dx)

    def _sum_of_products(self, pairs: tuple[tuple[Tensor | None, Tensor | None], ...]) -> Tensor:
        """Sum of a @ b over the pairs of which neither is None."""
        operand: Any = self.precision.operand
        out: Any = None
        for a, b in pairs:
            if a is None or b is None:
                continue
            if out is None:
                out = memory.empty((a.shape[0], a.shape[1], b.shape[2]), self.q)
                self.precision.matmul(operand(a), operand(b), out)
            else:
                self.precision.accumulate(out, operand(a), operand(b))
        return out

    def _scores(self, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Sum of a b^T over pairs (a [B, Q, size], b [B, T, size])."""
        return self._sum_of_products(tuple((a, None if b is None else b.mT) for a, b in pairs))

    def _mix(self, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Sum of A b over pairs (A [B, Q, T], b [B, T, size])."""
        return self._sum_of_products(pairs)

    def _mix_back(self, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Sum of A^T b over pairs (A [B, Q, T], b [B, Q, size])."""
        return self._sum_of_products(tuple((None if A is None else A.mT, b) for A, b in pairs))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """y and dy, each [N, T, query * size]."""
        S = self._scores((self.q, self.k)).mul_(self.heads.scale)
        dS = None
        if self.dq is not None:
            q_f = _sum(self.q, self.dq)
            dS = self._scores((self.dq, self.k), (q_f, self.dk)).mul_(self.heads.scale)
            del q_f
        if self.heads.softcap is not None:
            S, dS = self._cap(S, dS)
        mask = hidden(self.heads, self.tokens, S.device)
        if mask is not None:
            S.masked_fill_(mask, -torch.inf)
        self.P = torch.softmax(S, -1)
        y = self._mix((self.P, self.v))
        y = self.layout.join_output(y, self.v_mean, self.tokens)
        if dS is None:
            return y, None
        if mask is not None:
            dS.masked_fill_(mask, 0)
        self.dP = softmax_difference(S, dS, self.P)
        dy = self._mix((self.dP, self.v), (_sum(self.P, self.dP), self.dv))
        return y, self.layout.join_output(dy, self.dv_mean, self.tokens)

    def _cap(self, S: Tensor, dS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The softcap c tanh(S / c) of raw scores and its difference.

        tanh(a + d) - tanh(a) = tanh(d) (1 - tanh(a) tanh(a + d)).
        """
        cap = self.heads.softcap
        assert cap is not None
        self.tanh = self.tanh_f = torch.tanh(S / cap)
        self.dtanh: Any = None
        if dS is not None:
            self.tanh_f = torch.tanh((S + dS) / cap)
            self.dtanh = torch.tanh(dS / cap) * (1 - self.tanh * self.tanh_f)
            dS = cap * self.dtanh
        return cap * self.tanh, dS

    def backward(self, g: Tensor) -> Tensor:
        """g_x [N, T, packed]."""
        self.g = self.layout.split_output(g)
        A = self._scores((self.g, self.v))
        self.A = A.sub_(_mean(self.P, A))  # only the part off the mean acts on scores
        gR = self._score_cotangent()
        return self.layout.join(
            self._mix((gR, self.k)),
            self._mix_back((gR, self.q)),
            self._mix_back((self.P, self.g)),
        )

    def _score_cotangent(self) -> Tensor:
        """Cotangent of q k^T in the pretrained branch; recomputed rather than held."""
        return self._uncap(_times(self.P, self.A).mul_(self.heads.scale))

    def tangent(self, t: Tensor) -> Tensor:
        """t_y [N, T, query * size]."""
        self.tq, self.tk, self.tv, tv_mean = self.layout.split(t)
        tS = self._scores((self.tq, self.k), (self.q, self.tk)).mul_(self.heads.scale)
        if self.heads.softcap is not None:
            self.tR = tS.clone()
        tS = self._uncap(tS)
        self.tS = tS.sub_(_mean(self.P, tS))
        y = self._mix((_times(self.P, self.tS), self.v), (self.P, self.tv))
        return self.layout.join_output(y, tv_mean, self.tokens)

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """(S_x, b_x), each [N, T, packed].

        W, the cotangent of the scores in S_x, gathers three parts of the same form
        P (Z - mean of Z): J^T S, the part of (J_f - J)^T b from v_f - v, and the second
        derivative; and the part of (J_f - J)^T b from P_f - P.
        """
        scale = self.heads.scale
        S, b = self.layout.split_output(S), self.layout.split_output(b)
        P_f, A_f = self._finetuned_scores(b)
        Z = self._scores((S, self.v), (b, self.dv), (self.g, self.tv)).addcmul_(self.tS, self.A)
        W = Z.sub_(_mean(self.P, Z)).mul_(self.P)
        if self.dP is not None:
            D = _times(self.dP, A_f)
            W.addcmul_(self.P, D.sum(-1, keepdim=True), value=-1).add_(D)
            del D
        bS = A_f.mul_(P_f)
        if self.heads.softcap is not None:
            W, bS = self._uncap_reverse(W, bS)
        W, bR, gR = W.mul_(scale), bS.mul_(scale), self._score_cotangent()
        S_x = self.layout.join(
            self._mix((W, self.k), (bR, self.dk), (gR, self.tk)),
            self._mix_back((W, self.q), (bR, self.dq), (gR, self.tq)),
            self._mix_back((self.P, S), (self.dP, b), (_times(self.P, self.tS), self.g)),
        )
        return S_x, self._finetuned_cotangent(bR, P_f, b) if need_b else None

    def adjoint(self, b: Tensor) -> Tensor:
        """b_x [N, T, packed]."""
        b = self.layout.split_output(b)
        P_f, A_f = self._finetuned_scores(b)
        bR = A_f.mul_(P_f).mul_(self.heads.scale)
        if self.heads.softcap is not None:
            bR.mul_(1 - self.tanh_f.square())
        return self._finetuned_cotangent(bR, P_f, b)

    def _finetuned_scores(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """P_f, and the cotangent of P_f off its mean."""
        P_f = _sum(self.P, self.dP)
        A_f = self._scores((b, _sum(self.v, self.dv)))
        return P_f, A_f.sub_(_mean(P_f, A_f))

    def _finetuned_cotangent(self, bR: Tensor, P_f: Tensor, b: Tensor) -> Tensor:
        return self.layout.join(
            self._mix((bR, _sum(self.k, self.dk))),
            self._mix_back((bR, _sum(self.q, self.dq))),
            self._mix_back((P_f, b)),
        )

    def _uncap(self, A: Tensor) -> Tensor:
        """A, overwritten, times the derivative of the softcap in the pretrained branch."""
        return A if self.heads.softcap is None else A.mul_(1 - self.tanh.square())

    def _uncap_reverse(self, W: Tensor, bS: Tensor) -> tuple[Tensor, Tensor]:
        """Reverse sweep through the softcap c tanh(R / c): score cotangents (S, b) of R."""
        tanh, tanh_f = self.tanh, self.tanh_f
        slope = 1 - tanh.square()
        assert self.heads.softcap is not None
        curvature = -2 / self.heads.softcap * tanh * slope
        W = slope * W + curvature * self.P * self.A * self.tR
        if self.dtanh is not None:
            W -= self.dtanh * (tanh + tanh_f) * bS  # slope_f - slope
        return W, bS * (1 - tanh_f.square())


def _mean(P: Tensor, A: Tensor) -> Tensor:
    """Row means of A under P, [B, Q, 1]."""
    return _times(P, A).sum(-1, keepdim=True)


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.mul(a, b, out=memory.empty(a.shape, a))


def _sum(a: Tensor, da: Tensor | None) -> Tensor:
    return a if da is None else torch.add(a, da, out=memory.empty(a.shape, a))
