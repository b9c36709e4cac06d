"""How implementations of an operation are held against its definition.

For the package's own tests, and for anyone who writes another backend.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fda_fast.ops import memory

_SENTINEL = -7.25e33
_GUARD = 67


def assert_no_worse_than_torch(
    out: Tensor,
    gold: Tensor,
    baseline: Tensor,
    *,
    factor: float = 2.0,
    name: str = "out",
) -> None:
    """Hold a result to PyTorch's own error on the same inputs.

        max|out - gold| <= factor * max|baseline - gold| + eps(out.dtype) * max|gold|

    No tolerance is chosen by hand: an operation whose definition is badly conditioned is allowed
    what its plain PyTorch form loses, and nothing more.

    Args:
        out: the result under test.
        gold: the torch twin in float64 on the same inputs.
        baseline: the torch twin in the dtype of ``out``.
        factor: how many times PyTorch's error is allowed.
        name: used in the message.

    Raises:
        AssertionError: shapes differ, an element is not finite where gold is, or the error is too
            large; gives both errors, their ratio and the worst index.
    """
    if out.shape != gold.shape or baseline.shape != gold.shape:
        raise AssertionError(
            f"{name}: shape {[*out.shape]}, gold {[*gold.shape]}, baseline {[*baseline.shape]}"
        )
    if gold.dtype != torch.float64:
        raise AssertionError(f"{name}: gold must be float64, got {gold.dtype}")
    if out.numel() == 0:
        return
    wide = out.to("cpu", torch.float64)
    gold = gold.cpu()
    odd = ~torch.isfinite(wide) & torch.isfinite(gold)
    if odd.any():
        where = _index(int(odd.flatten().to(torch.uint8).argmax()), gold.shape)
        raise AssertionError(f"{name}: {int(odd.sum())} elements not finite, the first at {where}")
    error = (wide - gold).abs()
    worst = error.max().item()
    allowed = (baseline.to("cpu", torch.float64) - gold).abs().max().item()
    floor = torch.finfo(out.dtype).eps * gold.abs().max().item()
    if not worst <= factor * allowed + floor:
        where = _index(int(error.argmax()), gold.shape)
        ratio = worst / allowed if allowed else math.inf
        raise AssertionError(
            f"{name}: error {worst:.3e} at {where} is {ratio:.1f} times PyTorch's {allowed:.3e} "
            f"(allowed {factor} times, plus one rounding {floor:.1e}); "
            f"got {wide[where].item():.9g}, gold {gold[where].item():.9g}"
        )


def relative_error(out: Tensor, gold: Tensor) -> float:
    """|out - gold| / |gold| over all elements, in float64."""
    gold = gold.to("cpu", torch.float64)
    return ((out.to("cpu", torch.float64) - gold).norm() / gold.norm()).item()


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within, every output that the operations allocate starts as NaN.

    An element that an implementation forgets to write then fails the comparison.
    """
    before = memory._poisoned
    memory._poisoned = True
    try:
        yield
    finally:
        memory._poisoned = before


class GuardedView:
    """A contiguous tensor inside a larger buffer of sentinels, to catch writes out of bounds.

    The tensor starts at an address that is no multiple of a vector register.

    Args:
        values: copied into the view.

    Attributes:
        tensor: the view.
    """

    def __init__(self, values: Tensor) -> None:
        count = values.numel()
        self._buffer = torch.full(
            (count + 2 * _GUARD,), _SENTINEL, dtype=values.dtype, device=values.device
        )
        self.tensor = self._buffer[_GUARD : _GUARD + count].view(values.shape)
        self.tensor.copy_(values)

    def check(self) -> None:
        """Raise AssertionError if anything outside the view was written."""
        sentinel = torch.tensor(_SENTINEL, dtype=self._buffer.dtype, device=self._buffer.device)
        count = self._buffer.numel()
        for side, edge in (("before", slice(_GUARD)), ("after", slice(count - _GUARD, count))):
            if not bool((self._buffer[edge] == sentinel).all()):
                raise AssertionError(f"written {side} the tensor of shape {[*self.tensor.shape]}")


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))
