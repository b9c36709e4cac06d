"""Reverse sweep of the norms (see norm.py): one program walks one row three times.

    pass 1   means of x, dx, w S + mw g, w b, tw b, w g, t           ("layer" only)
    pass 2   the inner products of those with xc and dxc, and <w g, t>
    pass 3   S_x and b_x

The row stays in the first-level cache between the passes; keeping its ten tensors in registers
would spill from a width of 4096 on.
"""

import triton
import triton.language as tl

from . import launch
from .scalar import scale_step

# Ten tensors are live at once: columns of one block.
REVERSE_BLOCK = 1024


@triton.jit
def _loads(
    x_ptr, dx_ptr, g_ptr, t_ptr, S_ptr, b_ptr, weight_ptr, tw_ptr, mw_ptr,
    at, offs, task, mask,
    HAS_DX: tl.constexpr, HAS_T: tl.constexpr, HAS_G: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_TW: tl.constexpr, HAS_MW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, dx, h = w S + mw g, wb = w b, tb = tw b, gw = w g, t of one block; absent ones zero."""
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(S_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dx = zero
    g = zero
    t = zero
    tb = zero
    wb = b
    if HAS_DX:
        dx = tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_G:
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gw = g
    if HAS_T:
        t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        h *= weight
        wb = weight * b
        gw = weight * g
    if HAS_MW:
        h += g * tl.load(mw_ptr + task, mask=mask, other=0.0).to(tl.float32)
    if HAS_TW:
        tb = b * tl.load(tw_ptr + task, mask=mask, other=0.0).to(tl.float32)
    return x, dx, h, wb, tb, gw, t


@triton.jit
def _norm_reverse_kernel(
    x_ptr, dx_ptr, g_ptr, t_ptr, S_ptr, b_ptr, weight_ptr, tw_ptr, mw_ptr, S_x_ptr, b_x_ptr,
    rows, width, eps,
    LAYER: tl.constexpr, HAS_DX: tl.constexpr, HAS_T: tl.constexpr, HAS_G: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_TW: tl.constexpr, HAS_MW: tl.constexpr, HAS_B_X: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row of every tensor [K * rows, width]; tw, mw [K, width] of its task."""
    row = tl.program_id(0).to(tl.int64)
    base = row * width
    task_base = row // rows * width
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dtype=tl.float32)

    mean_x = 0.0
    mean_dx = 0.0
    mean_h = 0.0
    mean_wb = 0.0
    mean_tb = 0.0
    mean_gw = 0.0
    mean_t = 0.0
    if LAYER:
        s_x, s_dx, s_h, s_wb, s_tb, s_gw, s_t = zero, zero, zero, zero, zero, zero, zero
        for start in range(0, width, BLOCK):
            offs = start + lanes
            mask = offs < width
            x, dx, h, wb, tb, gw, t = _loads(
                x_ptr, dx_ptr, g_ptr, t_ptr, S_ptr, b_ptr, weight_ptr, tw_ptr, mw_ptr,
                base + offs, offs, task_base + offs, mask,
                HAS_DX, HAS_T, HAS_G, HAS_WEIGHT, HAS_TW, HAS_MW, BLOCK,
            )  # fmt: skip
            s_x += x
            s_dx += dx
            s_h += h
            s_wb += wb
            s_tb += tb
            s_gw += gw
            s_t += t
        mean_x = tl.sum(s_x, 0) / width
        mean_dx = tl.sum(s_dx, 0) / width
        mean_h = tl.sum(s_h, 0) / width
        mean_wb = tl.sum(s_wb, 0) / width
        mean_tb = tl.sum(s_tb, 0) / width
        mean_gw = tl.sum(s_gw, 0) / width
        mean_t = tl.sum(s_t, 0) / width

    # Sums of products with xc (_x) and with dxc (_d).
    xx, step, h_x, wb_x, wb_d = zero, zero, zero, zero, zero
    tb_x, tb_d, gw_x, t_x, gw_t = zero, zero, zero, zero, zero
    for start in range(0, width, BLOCK):
        offs = start + lanes
        mask = offs < width
        x, dx, h, wb, tb, gw, t = _loads(
            x_ptr, dx_ptr, g_ptr, t_ptr, S_ptr, b_ptr, weight_ptr, tw_ptr, mw_ptr,
            base + offs, offs, task_base + offs, mask,
            HAS_DX, HAS_T, HAS_G, HAS_WEIGHT, HAS_TW, HAS_MW, BLOCK,
        )  # fmt: skip
        xc = tl.where(mask, x - mean_x, 0.0)
        dxc = tl.where(mask, dx - mean_dx, 0.0)
        xx += xc * xc
        h_x += h * xc
        tb_x += tb * xc
        if HAS_DX:
            step += dxc * (2.0 * xc + dxc)
            wb_d += wb * dxc
            tb_d += tb * dxc
        wb_x += wb * xc
        if HAS_T:
            gw_x += gw * xc
            t_x += t * xc
            gw_t += tl.where(mask, (gw - mean_gw) * (t - mean_t), 0.0)
    rho = 1.0 / tl.sqrt_rn(tl.sum(xx, 0) / width + eps)
    rho_f = rho
    d_rho = 0.0 * rho
    if HAS_DX:
        rho_f, d_rho = scale_step(rho, tl.sum(step, 0) / width)
    m_h = rho * tl.sum(h_x, 0) / width
    # Means with xh, and their differences to those with xh_f = xh + dxc rho_f + xc d_rho.
    m_wb = rho * tl.sum(wb_x, 0) / width
    dm_wb = (rho_f * tl.sum(wb_d, 0) + d_rho * tl.sum(wb_x, 0)) / width
    m_tb_f = (rho_f * tl.sum(tb_d, 0) + (rho + d_rho) * tl.sum(tb_x, 0)) / width
    m_g = rho * tl.sum(gw_x, 0) / width
    m_t = rho * tl.sum(t_x, 0) / width
    q = tl.sum(gw_t, 0) / width - m_g * m_t

    for start in range(0, width, BLOCK):
        offs = start + lanes
        mask = offs < width
        x, dx, h, wb, tb, gw, t = _loads(
            x_ptr, dx_ptr, g_ptr, t_ptr, S_ptr, b_ptr, weight_ptr, tw_ptr, mw_ptr,
            base + offs, offs, task_base + offs, mask,
            HAS_DX, HAS_T, HAS_G, HAS_WEIGHT, HAS_TW, HAS_MW, BLOCK,
        )  # fmt: skip
        xc = x - mean_x
        xh = rho * xc
        dxh = rho_f * (dx - mean_dx) + d_rho * xc
        xh_f = xh + dxh
        S_x = rho * (h - mean_h - xh * m_h)
        if HAS_DX:
            S_x += d_rho * (wb - mean_wb - xh * m_wb)
            S_x -= rho_f * (dxh * (m_wb + dm_wb) + xh * dm_wb)
        if HAS_TW:
            S_x += rho_f * (tb - mean_tb - xh_f * m_tb_f)
        if HAS_T:
            S_x -= rho * rho * xh * q
            A_g = rho * (gw - mean_gw - xh * m_g)
            A_t = rho * (t - mean_t - xh * m_t)
            S_x -= rho * (m_t * A_g + m_g * A_t)
        tl.store(S_x_ptr + base + offs, S_x, mask=mask)
        if HAS_B_X:
            v = wb - mean_wb + tb - mean_tb
            b_x = rho_f * (v - xh_f * (m_wb + dm_wb + m_tb_f))
            tl.store(b_x_ptr + base + offs, b_x, mask=mask)


def run(layer, x, dx, g, t, S, b, weight, tw, mw, S_x, b_x, eps) -> None:
    """Fill S_x, and b_x unless None; tensors as in ``norm.reverse``, not empty."""
    tasks, rows, width = x.shape
    block = min(REVERSE_BLOCK, max(16, triton.next_power_of_2(width)))
    has_t = t is not None and g is not None
    with launch.on(x):
        _norm_reverse_kernel[(tasks * rows,)](
            x, dx, g, t, S, b, weight, tw, mw, S_x, b_x,
            rows, width, eps,
            LAYER=layer, HAS_DX=dx is not None, HAS_T=has_t,
            HAS_G=g is not None and (has_t or mw is not None), HAS_WEIGHT=weight is not None,
            HAS_TW=tw is not None, HAS_MW=mw is not None and g is not None,
            HAS_B_X=b_x is not None, BLOCK=block, num_warps=4 if block > 512 else 2,
        )  # fmt: skip
