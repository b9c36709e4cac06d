"""Outputs of the operations: reused buffers on the CPU, torch's own allocator elsewhere.

A large fresh allocation on the CPU is paid for in page faults: squaring ten million numbers takes
10 ms into fresh memory and 1.5 ms into memory that is already mapped. One construction step
allocates the same shapes again and again, so they come from a pool.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Below this the C library serves the request from mapped memory anyway.
_SMALLEST = 256 * 1024
# A free buffer serves a request of at least this share of its size.
_FIT = 0.75
# Free buffers are dropped, oldest first, beyond this multiple of the largest use seen.
_SLACK = 1.5
_ALIGN = 64


class _Pool:
    """Free buffers by age; a lease ends when torch's storage over it is destroyed.

    The storage holds a numpy view, and a finaliser on that view gives the buffer back: views of a
    tensor share its storage, so a buffer cannot return while any view of it is alive. Finalisers
    may run in any thread or inside the collector, so the free list is touched by atomic list
    operations only, and never under a lock.
    """

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        self.used_bytes = 0
        self.peak_bytes = 0

    def lease(self, nbytes: int) -> np.ndarray:
        slab = self._take(nbytes)
        if slab is None:
            self._shrink_for(nbytes)
            slab = _allocate(nbytes)
        self.used_bytes += slab.nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        view = slab[:nbytes]
        weakref.finalize(view, self._give, slab).atexit = False
        return view

    def _take(self, nbytes: int) -> np.ndarray | None:
        """The smallest fitting free buffer, the latest given back among equals, or None."""
        best = None
        for slab in reversed(tuple(self.free)):
            if slab.nbytes == nbytes:  # in a loop of one shape nearly always; warm in the cache
                best = slab
                break
            fits = nbytes <= slab.nbytes <= nbytes / _FIT
            if fits and (best is None or slab.nbytes < best.nbytes):
                best = slab
        if best is None:
            return None
        for position, slab in enumerate(self.free):
            if slab is best:
                try:
                    taken = self.free.pop(position)
                except IndexError:
                    return None
                # Another thread may have moved the list in between: give a misfit back.
                if taken.nbytes >= nbytes:
                    return taken
                self.free.append(taken)
                return None
        return None

    def _give(self, slab: np.ndarray) -> None:
        self.used_bytes -= slab.nbytes
        self.free.append(slab)

    def _shrink_for(self, nbytes: int) -> None:
        room = _SLACK * max(self.peak_bytes, self.used_bytes + nbytes) - self.used_bytes - nbytes
        excess = sum(slab.nbytes for slab in tuple(self.free)) - room
        while excess > 0 and self.free:
            excess -= self.free.pop(0).nbytes


def _allocate(nbytes: int) -> np.ndarray:
    """A buffer of at least nbytes whose first byte is aligned for vector loads."""
    raw = np.empty(nbytes + _ALIGN, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + nbytes]


_pool = _Pool()
# Set by fda_fast.testing.poisoned_empty: fill every output with NaN so that an element that an
# operation forgets to write is seen.
_poisoned = False


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on the device of ``like``.

    Args:
        shape: sizes of the result.
        like: gives the device, and the dtype unless one is named.
        dtype: dtype of the result. Default: that of ``like``.

    Returns:
        Tensor of ``shape``; on the CPU, from 256 KiB on, over a pooled buffer that is reused once
        the tensor and all its views are gone.
    """
    dtype = like.dtype if dtype is None else dtype
    shape = tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or nbytes < _SMALLEST:
        out = torch.empty(shape, dtype=dtype, device=like.device)
    else:
        storage = torch.from_numpy(_pool.lease(nbytes)).untyped_storage()
        # Strides may be left out, which torch's own annotations do not know.
        out = torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
    if _poisoned and dtype.is_floating_point:
        out.fill_(math.nan)
    return out


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the shape, dtype and device of ``x``; see empty."""
    return empty(x.shape, x)


def trim() -> None:
    """Give every free pooled buffer back to the system, and forget the largest use seen."""
    _pool.free.clear()
    _pool.peak_bytes = _pool.used_bytes


def pooled_bytes() -> tuple[int, int]:
    """Bytes of the CPU pool in use by living tensors, and bytes held free for reuse."""
    return _pool.used_bytes, sum(slab.nbytes for slab in tuple(_pool.free))
