"""Frozen launch configurations, and where a launch goes.

Every number here was chosen without timing: by the compiler's resource report (registers, no
spills, shared memory) and by the rule of 8 to 16 independent elements in flight per thread. A
table that a measurement has chosen says so beside the entry.

FDA_FAST_AUTOTUNE=1 times the alternatives of kernels that only write fresh outputs, once per
process, shape and device, and keeps the best; off (the default), the first entry is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Args:
        block: elements (elementwise kernels), columns (row kernels) or rows (attention) of one
            program; a power of two.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline of loads inside loops.
        max_registers: registers of one thread. Left to itself (None), the assembler may move a
            few to memory where that lets one more block run; with a limit it does so at it only.
    """

    block: int
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """Keyword arguments every Triton launch takes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


# Architecture -> alternatives, first is the default. 80: A100; 90: H100, H200; 100: B200.
ELEMENTWISE = {
    80: (Launch(1024, 4), Launch(2048, 8)),
    90: (Launch(1024, 4), Launch(2048, 8)),
    100: (Launch(1024, 4), Launch(2048, 4)),
}
# Kernels that stream six or more tensors keep fewer elements of each in registers.
WIDE_ELEMENTWISE = {
    80: (Launch(512, 4), Launch(1024, 4)),
    90: (Launch(512, 4), Launch(1024, 8)),
    100: (Launch(512, 4), Launch(1024, 8)),
}
# Row kernels hold a whole row: (widest row, launch), the block is the row's power of two.
ROW_LADDER = ((512, 2), (1024, 4), (2048, 8), (8192, 16))
# Beyond, the registers of one program spill.
WIDEST_ROW = ROW_LADDER[-1][0]
# One program of a reduction reads SEGMENT columns; the count of segments is fixed by the shape
# alone, never by the card, so that results do not depend on the card.
SEGMENT = 4096
REDUCTION = {80: (Launch(1024, 4),), 90: (Launch(1024, 4),), 100: (Launch(1024, 4),)}


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(tensor: torch.Tensor) -> int:
    """80, 90 or 100: the newest table entry the tensor's card can use.

    The interpreter (CPU tensors) uses the entry of 90, so it runs the shapes that ship.
    """
    if not tensor.is_cuda:
        return 90
    found = _capability(tensor.device.index)
    return max((arch for arch in ELEMENTWISE if arch <= found), default=80)


def elementwise(tensor: torch.Tensor, *, wide: bool = False) -> tuple[Launch, ...]:
    """Alternatives of an elementwise kernel; ``wide`` for six or more streamed tensors."""
    return (WIDE_ELEMENTWISE if wide else ELEMENTWISE)[architecture(tensor)]


def row(width: int) -> Launch:
    """Launch of a kernel that holds one row of ``width`` columns in registers.

    Raises:
        ValueError: the row is wider than a program can hold.
    """
    for widest, num_warps in ROW_LADDER:
        if width <= widest:
            return Launch(max(16, triton.next_power_of_2(width)), num_warps)
    raise ValueError(f"row width: expected at most {ROW_LADDER[-1][0]}, got {width}")


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's card current, so that its current stream is the one Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


_chosen: dict[tuple, Launch] = {}


def _milliseconds(run: Callable[[Launch], None], one: Launch) -> float:
    return triton.testing.do_bench(lambda: run(one), warmup=5, rep=20, return_mode="median")


def pick(key: tuple, alternatives: tuple[Launch, ...], run: Callable[[Launch], None]) -> None:
    """Run a kernel with the first alternative, or with the fastest one under FDA_FAST_AUTOTUNE=1.

    Args:
        key: what the choice may depend on: kernel name, shapes, dtypes, device.
        alternatives: at least one.
        run: launches the kernel; may be called many times, so it must only write fresh outputs.
    """
    if os.environ.get("FDA_FAST_AUTOTUNE", "0") != "1" or len(alternatives) == 1:
        run(alternatives[0])
        return
    if key not in _chosen:
        # Timing synchronises, which a capturing stream forbids: an untuned shape keeps the default.
        if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
            run(alternatives[0])
            return
        _chosen[key] = min(alternatives, key=lambda one: _milliseconds(run, one))
    run(_chosen[key])


def attention(tensor: torch.Tensor, kind: str, tokens: int, size: int, products: str) -> Launch:
    """Launch of an attention kernel: BLOCK tokens of queries and of keys.

    Args:
        tensor: on the card that will run it.
        kind: "forward", "backward", "tangent" or "reverse".
        tokens: length of the sequences.
        size: width of a head.
        products: "ieee" (float32 on the ordinary units) or "tf32" (tensor cores).
    """
    arch = architecture(tensor)
    exact = products == "ieee"
    if tokens <= 16 or (exact and (kind == "reverse" or size > 64)):
        block, num_warps = 16, 8 if exact and kind == "reverse" and arch >= 100 else 4
    elif kind == "reverse":
        block, num_warps = (32, 8) if size <= 64 and arch < 100 else (16, 4)
    elif exact or tokens <= 32 or size > 64 or (kind == "forward" and arch < 90):
        block, num_warps = 32, 8
    else:
        block, num_warps = 64, 8
    return Launch(block, num_warps, max_registers=255)
