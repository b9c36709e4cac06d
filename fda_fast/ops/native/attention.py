"""Attention over short sequences in C++, one head at a time in the cache; see ops.attention.

Long sequences, a softcap, or products that imitate a GPU's are left to the PyTorch twin, whose
products are the BLAS library's. Native bfloat16 is for them alone: a short head stays in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fda_fast.ops.memory import empty, empty_like
from fda_fast.ops.native.call import address, library, threads
from fda_fast.ops.reference import attention as twin

if TYPE_CHECKING:
    from fda_fast.ops.attention import Heads

# Rows times tokens of a score matrix up to which one core's cache still serves well: measured 1.1
# to 2 times the twin below, on par at 1024 x 1024.
LARGEST_SCORES = 320 * 320
# kPad of csrc/cpu/matrix.h.
_PAD = 16


def forward(
    x: Tensor,
    dx: Tensor | None,
    heads: Heads,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    precision: Any = None,
) -> tuple[Tensor, Tensor | None, Sweeps | twin.Sweeps]:
    """See fda_fast.ops.attention.forward."""
    tokens = x.shape[1]
    scores = tokens * tokens * (heads.query // heads.key_value)
    full = precision is None or not precision.imitates
    if not full or heads.softcap is not None or scores > LARGEST_SCORES or not x.numel():
        return twin.forward(x, dx, heads, rope=rope, precision=precision)
    sweeps = Sweeps(x, dx, heads, rope)
    y, dy = sweeps.forward()
    return y, dy, sweeps


class Sweeps:
    """One evaluation: the packed inputs, and the score matrices that later sweeps read."""

    def __init__(
        self,
        x: Tensor,
        dx: Tensor | None,
        heads: Heads,
        rope: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.x, self.dx = x, dx
        count, tokens, _ = x.shape
        window = 0
        if heads.causal:
            window = tokens if heads.window is None else min(heads.window, tokens)
        self._rope: list[Tensor] = []
        if rope is not None:
            self._rope = [table.to(torch.float32).contiguous() for table in rope]
        rotary = self._rope[0].shape[-1] if self._rope else 0
        self._sizes = torch.tensor(
            [count, tokens, heads.query, heads.key_value, heads.size, window, rotary],
            dtype=torch.int64,
        )
        tables = [address("rope", table, (tokens, rotary)) for table in self._rope] or [0, 0]
        self._head = (self._sizes.data_ptr(), heads.scale, *tables)
        self._output = (count, tokens, heads.query * heads.size)
        rows = tokens * (heads.query // heads.key_value)
        self._scores = (count, heads.key_value, rows, -(-tokens // _PAD) * _PAD)

    def _run(self, name: str, *tensors: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
        room = library().attention_scratch(self._sizes.data_ptr())
        count = threads()
        scratch = empty((count, room), self.x)
        addresses = [address(*tensor) for tensor in tensors]
        getattr(library(), name)(*self._head, *addresses, scratch.data_ptr(), count)

    def _inputs(self) -> list[tuple[str, Tensor | None, tuple[int, ...]]]:
        return [("x", self.x, self.x.shape), ("dx", self.dx, self.x.shape)]

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """y and dy, each [N, T, query * size]."""
        y, self.P = empty(self._output, self.x), empty(self._scores, self.x)
        dy = self.dP = None
        if self.dx is not None:
            dy, self.dP = empty(self._output, self.x), empty(self._scores, self.x)
        self._run(
            "attention_forward", *self._inputs(), ("y", y, self._output),
            ("dy", dy, self._output), ("P", self.P, self._scores), ("dP", self.dP, self._scores),
        )  # fmt: skip
        return y, dy

    def backward(self, g: Tensor) -> Tensor:
        """g_x [N, T, packed]."""
        self.g = g
        self.A, g_x = empty(self._scores, g), empty_like(self.x)
        self._run(
            "attention_backward", ("x", self.x, self.x.shape), ("g", g, self._output),
            ("P", self.P, self._scores), ("A", self.A, self._scores), ("g_x", g_x, g_x.shape),
        )  # fmt: skip
        return g_x

    def tangent(self, t: Tensor) -> Tensor:
        """t_y [N, T, query * size]."""
        self.t = t
        self.tS, t_y = empty(self._scores, t), empty(self._output, t)
        self._run(
            "attention_tangent", ("x", self.x, self.x.shape), ("t", t, self.x.shape),
            ("P", self.P, self._scores), ("tS", self.tS, self._scores),
            ("t_y", t_y, self._output),
        )  # fmt: skip
        return t_y

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """(S_x, b_x), each [N, T, packed]."""
        S_x, b_x = empty_like(self.x), empty_like(self.x) if need_b else None
        self._run(
            "attention_reverse", *self._inputs(), ("g", self.g, self._output),
            ("t", self.t, self.x.shape), ("S", S, self._output), ("b", b, self._output),
            ("P", self.P, self._scores), ("dP", self.dP, self._scores),
            ("A", self.A, self._scores), ("tS", self.tS, self._scores),
            ("S_x", S_x, self.x.shape), ("b_x", b_x, self.x.shape),
        )  # fmt: skip
        return S_x, b_x

    def adjoint(self, b: Tensor) -> Tensor:
        """b_x [N, T, packed]."""
        b_x = empty_like(self.x)
        self._run(
            "attention_adjoint", *self._inputs(), ("b", b, self._output),
            ("P", self.P, self._scores), ("dP", self.dP, self._scores),
            ("b_x", b_x, self.x.shape),
        )  # fmt: skip
        return b_x
