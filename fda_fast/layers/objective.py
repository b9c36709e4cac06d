"""A scalar function of the layer's output at the end of a program, in place of a similarity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fda_fast.errors import InputError


class Objective:
    """phi(y) of the pretrained branch alone, with the interface of ``Similarity``.

        forward   g_y = phi'(y)
        reverse   S_y = phi''(y) t_y,  b_y = 0

    The output is small beside the layer, so autograd differentiates phi; the layer itself is left
    to the sweeps.

    Args:
        function: maps y [n, (T,) d_out] to a scalar, twice differentiable.
        shape: (n,) or (n, T), the leading dimensions of y.

    Raises:
        InputError: from ``forward``: the function gives no scalar, or one that y does not enter.
    """

    scale = 1.0

    def __init__(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        self._function, self._shape = function, shape
        self._y: Any = None  # kept between sweeps, with the graph from y to g
        self._g: Any = None

    @property
    def output(self) -> Tensor:
        """The pretrained output kept for ``reverse``."""
        return self._y.detach()

    def forward(self, y: Tensor, dy: Tensor) -> Tensor:
        """g [1, R, d], the cotangent of phi at the output; ``dy`` does not enter."""
        with torch.enable_grad():
            self._y = y.detach().view(*self._shape, y.shape[-1]).requires_grad_()
            value = check_scalar(self._function(self._y))
            (self._g,) = torch.autograd.grad(value, self._y, create_graph=True)
        return self._g.detach().contiguous().view(y.shape)

    def reverse(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """S and b at the output, from the tangent there; each shaped as ``t``."""
        y, g = self._y, self._g
        self._y = self._g = None
        S = None
        if g.requires_grad:
            (S,) = torch.autograd.grad(g, y, t.view(y.shape), allow_unused=True)
        S = torch.zeros_like(t) if S is None else S.contiguous().view(t.shape)
        return S, torch.zeros_like(t)


def check_scalar(value: Any) -> Tensor:
    """The value of an objective, checked to be a scalar with a gradient."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            "objective", expected="a function of the layer's output to a scalar tensor", got=got
        )
    return value.reshape(())
