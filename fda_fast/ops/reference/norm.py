"""LayerNorm and RMSNorm in plain torch, differences written without cancellation.

With xc = x - mean(x) (x itself for "rms"), rho = 1 / sqrt(mean(xc^2) + eps), xh = rho xc, and

    A(xh, rho, h) = rho (center(h) - xh mean(h xh))        (center: identity for "rms")

the Jacobian of xh is the symmetric map A, so y = w xh + c gives every sweep below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Side(NamedTuple):
    xh: Tensor  # [K, R, d]
    rho: Tensor  # [K, R, 1]


def _center(kind: str, h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True) if kind == "layer" else h


def _mean(h: Tensor) -> Tensor:
    return h.mean(-1, keepdim=True)


def _normalise(kind: str, x: Tensor, eps: float) -> tuple[_Side, Tensor]:
    """The normalised side and xc."""
    xc = _center(kind, x)
    rho = torch.rsqrt(_mean(xc * xc) + eps)
    return _Side(xc * rho, rho), xc


def _difference(
    kind: str, p: _Side, xc: Tensor, dx: Tensor | None
) -> tuple[_Side, Tensor | None, Tensor | None]:
    """The fine-tuned side, xh_f - xh and rho_f - rho; the last two None if dx is."""
    if dx is None:
        return p, None, None
    dxc = _center(kind, dx)
    variance_step = _mean(dxc * (2 * xc + dxc))
    rho_f = torch.rsqrt(1 / (p.rho * p.rho) + variance_step)
    # 1/s_f - 1/s = (s^2 - s_f^2) / (s s_f (s + s_f)), s = 1/rho
    d_rho = -variance_step * p.rho * rho_f / (1 / p.rho + 1 / rho_f)
    dxh = dxc * rho_f + xc * d_rho
    return _Side(p.xh + dxh, rho_f), dxh, d_rho


def _apply(kind: str, side: _Side, h: Tensor) -> Tensor:
    """A(xh, rho, h)."""
    return side.rho * (_center(kind, h) - side.xh * _mean(h * side.xh))


def _rows(v: Tensor) -> Tensor:
    """[K, d] as [K, 1, d]."""
    return v.unsqueeze(1)


def forward(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tw: Tensor | None,
    tb: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.norm.forward."""
    p, xc = _normalise(kind, x, eps)
    f, dxh, _ = _difference(kind, p, xc, dx)
    y = p.xh if weight is None else p.xh * weight
    y = y if bias is None else y + bias
    dy = dxh
    if dxh is not None and weight is not None:
        dy = dxh * weight
    if tw is not None:
        moved = f.xh * _rows(tw)
        dy = moved if dy is None else dy + moved
    if tb is not None:
        dy = _rows(tb).expand_as(x) if dy is None else dy + _rows(tb)
    return y, None if dy is None else dy.contiguous()


def backward(
    kind: str,
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    eps: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See fda_fast.ops.norm.backward."""
    p, _ = _normalise(kind, x, eps)
    g_x = _apply(kind, p, g if weight is None else g * weight) if need_input else None
    g_weight = (g * p.xh).sum(1) if need_weight else None
    return g_x, g_weight, g.sum(1) if need_bias else None


def tangent(
    kind: str,
    x: Tensor,
    t: Tensor | None,
    weight: Tensor | None,
    mw: Tensor | None,
    mb: Tensor | None,
    eps: float,
) -> Tensor | None:
    """See fda_fast.ops.norm.tangent."""
    p, _ = _normalise(kind, x, eps)
    out = None
    if t is not None:
        out = _apply(kind, p, t)
        out = out if weight is None else out * weight
    if mw is not None:
        moved = p.xh * _rows(mw)
        out = moved if out is None else out + moved
    if mb is not None:
        out = _rows(mb).expand_as(x) if out is None else out + _rows(mb)
    return None if out is None else out.contiguous()


def reverse(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    g: Tensor | None,
    t: Tensor | None,
    S: Tensor,
    b: Tensor,
    weight: Tensor | None,
    tw: Tensor | None,
    mw: Tensor | None,
    eps: float,
    need_b: bool,
) -> tuple[Tensor, Tensor | None]:
    """See fda_fast.ops.norm.reverse."""
    p, xc = _normalise(kind, x, eps)
    f, dxh, d_rho = _difference(kind, p, xc, dx)
    h = S if weight is None else S * weight
    if mw is not None and g is not None:
        h = h + g * _rows(mw)
    S_x = _apply(kind, p, h)
    wb = b if weight is None else b * weight
    if dxh is not None and d_rho is not None:
        # A_f(wb) - A(wb), from the differences of its factors
        m, dm = _mean(wb * p.xh), _mean(wb * dxh)
        S_x += d_rho * (_center(kind, wb) - p.xh * m) - f.rho * (dxh * (m + dm) + p.xh * dm)
    if tw is not None:
        S_x += _apply(kind, f, b * _rows(tw))
    if g is not None and t is not None:
        # d/dx <g w, A(xh, rho, t)>
        gw = g if weight is None else g * weight
        m_g, m_t = _mean(gw * p.xh), _mean(t * p.xh)
        q = _mean(_center(kind, gw) * _center(kind, t)) - m_g * m_t
        S_x -= p.rho**2 * p.xh * q
        S_x -= p.rho * (m_t * _apply(kind, p, gw) + m_g * _apply(kind, p, t))
    if not need_b:
        return S_x, None
    return S_x, _apply(kind, f, wb if tw is None else wb + b * _rows(tw))


def adjoint(
    kind: str,
    x: Tensor,
    dx: Tensor | None,
    b: Tensor,
    weight: Tensor | None,
    tw: Tensor | None,
    eps: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See fda_fast.ops.norm.adjoint."""
    p, xc = _normalise(kind, x, eps)
    f, _, _ = _difference(kind, p, xc, dx)
    wb = b if weight is None else b * weight
    if tw is not None:
        wb = wb + b * _rows(tw)
    b_x = _apply(kind, f, wb) if need_input else None
    grad_weight = (b * f.xh).sum(1) if need_weight else None
    return b_x, grad_weight, b.sum(1) if need_bias else None
