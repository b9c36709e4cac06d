"""Damaged kernels are found out: one mistake each, and the message that names it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import emulated_build
import emulated_device
import pytest
import torch

from fda_fast.ops import adamw, alignment

_number = itertools.count()


def dots() -> None:
    g, u, v = (torch.randn(2, 70, 1536) for _ in range(3))
    alignment.dots(g, u, v, (512, 1024), backend="cuda")


def dots_at_odd_addresses() -> None:
    g, u, v = (torch.randn(2 * 3 * 8 + 1)[1:].view(2, 3, 8) for _ in range(3))
    alignment.dots(g, u, v, (8,), backend="cuda")


def step() -> None:
    x, g, m, v, best = (torch.rand(1, 300) for _ in range(5))
    loss, best_loss = torch.zeros(1), torch.ones(1)
    adamw.step_(x, g, m, v, 1, loss, best_loss, best, 0.1, backend="cuda")


@dataclass
class Mutant:
    source: str
    file: str
    old: str
    new: str
    run: Callable[[], None]
    message: str


FIRST_BARRIER = "  x = warp_sum(x);\n  __syncthreads();\n"
SECOND_BARRIER = "= x;\n  __syncthreads();\n"
MUTANTS = {
    "a column too many": Mutant(
        "adamw.cu", "adamw.cu",
        "if (column >= n) return;",
        "if (column > n) return;",
        step,
        r"step_kernel<4>, block \(0, 0, 0\), thread \(75, 0, 0\): reads 16 bytes at 1200 of "
        r"torch.float32 \[1, 300\], which has 1200",
    ),
    "best loss written where others read it": Mutant(
        "adamw.cu", "adamw.cu",
        "store<N>(best + at, x);",
        "best[at] = const_cast<float*>(best_loss)[task] = loss[task];",
        step,
        "in a race with another thread",
    ),
    "not on the stream": Mutant(
        "adamw.cu", "adamw.cu",
        "kThreads, 0, stream>>>(\n      tasks",
        "kThreads>>>(\n      tasks",
        step,
        "record_kernel is not on the current stream",
    ),
    "wide access at an odd address": Mutant(
        "alignment.cu", "alignment.cu",
        "return whole && all_aligned16(t.g, t.u, t.v);",
        "return whole;",
        dots_at_odd_addresses,
        r"common.cuh:\d+: .* misaligned address .* which requires 16 byte alignment",
    ),
    "blocks share a result": Mutant(
        "alignment.cu", "alignment.cu",
        "partial[task * chunks + chunk] = gu;",
        "partial[task * chunks] = gu;",
        dots,
        "writes 4 bytes .* in a race with another thread",
    ),
    "an index beyond an array": Mutant(
        "alignment.cu", "alignment.cu",
        "chunk >= batch.first[s + 1]) ++s;",
        "chunk >= batch.first[s + 40]) ++s;",
        dots,
        r"alignment.cu:\d+: Index 40 out of bounds",
    ),
    "no barrier between two sums": Mutant(
        "alignment.cu", "common.cuh",
        FIRST_BARRIER,
        "  x = warp_sum(x);\n",
        dots,
        "of shared memory, which has 32, in a race with another thread",
    ),
    "no barrier before a sum is read": Mutant(
        "alignment.cu", "common.cuh",
        SECOND_BARRIER,
        "= x;\n",
        dots,
        "of shared memory, which has 32, which nobody has written",
    ),
    "a barrier for some": Mutant(
        "alignment.cu", "common.cuh",
        FIRST_BARRIER,
        "  x = warp_sum(x);\n  if (threadIdx.x != 64) __syncthreads();\n",
        dots,
        "thread 0 waits at __syncthreads; thread 64 waits at a shuffle; thread 65 ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_is_found_out(name, emulator, monkeypatch):
    mutant = MUTANTS[name]
    module = emulator.mutant(next(_number), mutant.source, mutant.file, mutant.old, mutant.new)
    emulated_device.install(module, monkeypatch)
    with pytest.raises(RuntimeError, match=mutant.message):
        mutant.run()


def test_unknown_syntax_is_refused():
    for source in ("f<g<int>><<<1, 2>>>(x);", "extern __shared__ float s[];"):
        with pytest.raises(ValueError, match="does not understand its use of"):
            emulated_build.rewrite(source, emulated_build.SOURCES[0])
