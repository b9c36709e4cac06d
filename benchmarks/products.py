"""Operations of matrix products, also of those that torch's own counter does not know."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
# Position of the first operand among the arguments.
_FIRST = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}


def operands(func: Any, args: tuple) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both operands of a matrix product that a dispatch mode sees; None for other functions."""
    first = _FIRST.get(func.overloadpacket)
    return None if first is None else (args[first], args[first + 1])


def product_flops(func: Any, args: tuple) -> int:
    """Multiplications and additions of a call that a dispatch mode sees; 0 if it is no product."""
    found = operands(func, args)
    if found is None:
        return 0
    a, b = found
    batch = 1 if a.dim() == 2 else a.shape[0]
    return 2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]
