"""How much memory a merge may take: chosen before it starts, refused when it cannot do with it."""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fda_fast import estimate
from fda_fast.errors import InputError

if TYPE_CHECKING:
    from fda_fast.job import Job

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Estimates may be this much too low; and a process grows a little by what it loads later.
_MARGIN, _LOADED_LATER = 0.06, 48 << 20
# What Python and torch take, rounded up: parts must not depend on a megabyte more or less of it.
_PROGRAM = 512 << 20
_M_MMAP_THRESHOLD, _THRESHOLD = -3, 1 << 20
# Without a limit of the user's this share of what is free may be filled.
_SHARE_OF_FREE = 0.85
# Halving the anchors at once must bring memory down to this share, or it is given up.
_WORTH_A_SPLIT = 0.99


@dataclass(frozen=True)
class Limits:
    """How a merge keeps within its memory.

    Attributes:
        batch: tasks optimised in one batch.
        part: anchors of a task that a step holds at once; None for all.
        overlap: whether the next layer is read and the last one saved beside the computation.
        memory: estimated peak of the host's memory, bytes, the process as it is included.
        gpu_memory: estimated peak of the device's; 0 on a CPU.
    """

    batch: int
    overlap: bool
    memory: int
    gpu_memory: int = 0
    part: int | None = None


def parse_bytes(text: str | int | None, what: str) -> int | None:
    """Bytes of "6GiB", "800 MB", "1.5GiB" or a number; None stays None.

    Args:
        text: what the user wrote.
        what: the option, for the message.

    Raises:
        InputError: not a size above zero.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i)?)?B?", str(text).strip(), re.I)
    unit = (found[2] or "").upper() if found else ""
    factor = _BINARY[unit] if found and found[3] else _UNITS[unit]
    size = int(float(found[1]) * factor) if found and not isinstance(text, bool) else 0
    if size < 1:
        raise InputError(what, expected='such as "6GiB" or "800MB"', got=repr(text))
    return size


def shown(count: int) -> str:
    """Bytes in GiB or MiB, as budgets are written."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def resident() -> int:
    """Bytes of this process in memory now; 0 where the system does not tell."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes this process has had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.M)
    return 1024 * int(found[1]) if found else 0


def give_back_at_once() -> None:
    """Let the C library return every freed block above 1 MiB to the system at once.

    Otherwise glibc keeps blocks of up to 32 MiB for later, and what a process holds depends on the
    order in which it freed them. Counts for the whole process; nothing happens elsewhere.
    """
    library = ctypes.CDLL(None)
    if os.name == "posix" and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)


def workload(job: Job) -> estimate.Workload:
    """What a merge asks of every layer."""
    settings = job.settings
    tasks = len(job.experts)
    if not settings.optimises:
        return estimate.Workload(tasks, optimises=False)
    made, fitted = settings.construct, settings.adapt
    coefficients = 0
    if fitted.mode == "coefficients":
        coefficients = tasks if fitted.per_task else 1
    return estimate.Workload(
        tasks,
        made.anchors,
        made.tokens or 1,
        made.steps,
        fitted.epochs,
        fitted.batch_size,
        coefficients,
        starts=settings.start != "pretrained" and not fitted.per_task,
        snapshots=max(0, len(fitted.snapshots) - 1),
    )


def choose_limits(
    job: Job, max_memory: int | None = None, max_gpu_memory: int | None = None
) -> Limits:
    """Fit a merge into memory: overlap where it fits, as many tasks per batch as fit.

    On the CPU tasks are always constructed one by one, which costs a few per cent of time, so that
    results do not depend on memory. On a GPU the size of a batch can change the last bits of a
    result. Where one layer with one task does not fit, its anchors are halved until it does: that
    costs up to a third of the time, and can change last bits too, so it depends on ``max_memory``
    alone, or on the memory that is free if otherwise nothing would go. A job keeps the sizes that
    it began with.

    Args:
        job: the merge.
        max_memory: most bytes of the host's memory, this process included; None: what is free.
        max_gpu_memory: most bytes of the device's; None: what is free.

    Raises:
        InputError: a limit of the user's cannot be kept; with the layer and the bytes it needs.
    """
    load = workload(job)
    gpu = job.device.type == "cuda"
    floor = resident() + _LOADED_LATER
    batch, gpu_overlap, gpu_memory = 1, True, 0
    if gpu:
        batch, load, gpu_overlap, gpu_memory = _fit_gpu(job, load, max_gpu_memory)
    else:
        usual = max(floor, _PROGRAM)
        room = _room(max_memory, usual, share=1.0) - usual
        load = _in_parts(load, room, lambda load: host_memory(job, load, overlap=False).bound)
    ahead = host_memory(job, load, overlap=True)
    if gpu_overlap and floor + ahead.bound <= _room(max_memory, floor):
        return Limits(batch, True, floor + ahead.expected, gpu_memory, load.part)
    alone = host_memory(job, load, overlap=False)
    if max_memory is not None and floor + alone.bound > max_memory:
        held = "" if load.part is None else f" and {load.part} anchors"
        raise InputError(
            f"max_memory {shown(max_memory)} is too small for {alone.what} with {load.tasks} "
            "experts",
            expected=f"at least {shown(floor + alone.bound)}: {shown(alone.bound)} for one layer"
            f"{held} at a time, {shown(floor)} for the program itself",
            got=shown(max_memory),
            fix="Give more, use fewer experts, or scope: mlp",
        )
    return Limits(batch, False, floor + alone.expected, gpu_memory, load.part)


def _in_parts(
    load: estimate.Workload, room: int, need: Callable[[estimate.Workload], int]
) -> estimate.Workload:
    """The workload with as many anchors at once as fit into ``room`` bytes: all, half, a quarter...

    Where none fits, that of which smaller parts would save nothing.
    """
    least = need(load)
    while least > room and (load.part or load.anchors) > 1:
        smaller = replace(load, part=math.ceil((load.part or load.anchors) / 2))
        found = need(smaller)
        if found > _WORTH_A_SPLIT * least:
            break
        load, least = smaller, found
    return load


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the host's memory beyond the program itself.

    Attributes:
        expected: the peak.
        bound: with everything that can happen at once, and a margin.
        what: the layer or tensor that reaches it.
    """

    expected: int
    bound: int
    what: str


def _room(limit: int | None, floor: int, share: float = _SHARE_OF_FREE) -> int:
    if limit is not None:
        return limit
    from fda_fast.job import free_memory

    return floor + int(share * free_memory(torch.device("cpu")))


def host_memory(job: Job, load: estimate.Workload, *, overlap: bool) -> HostMemory:
    """Peak of the host's memory beyond the program itself, over all layers and other tensors."""
    from fda_fast.output import keeps_layers

    found = [(0, 0, "nothing")]
    layered = keeps_layers(job)
    inside: set[str] = set()
    for spec in job.layers if layered else []:
        inside |= set(spec.parameters.values())
        itemsize = max(job.base.names[n].dtype.itemsize for n in spec.parameters.values())
        need = estimate.layer_memory(spec, load, itemsize=itemsize)
        if job.device.type == "cuda":  # on its way to the device, and back
            need = replace(need, work=0)
        found.append((need.bound(overlap), need.total(overlap), f"layer {spec.name}"))
    merged = job.settings.outside == "start" and job.settings.start != "pretrained"
    for name, info in job.base.names.items():
        total = estimate.tensor_memory(
            info.numel,
            estimate.FLOAT if name in inside else info.dtype.itemsize,
            load,
            merged=name not in inside and (merged or not layered),
            summed=job.settings.start == "task_arithmetic",
            overlap=overlap,
        )
        found.append((total, total, f"tensor {name}"))
    bound, _, what = max(found)
    return HostMemory(max(total for _, total, _ in found), int(bound * (1 + _MARGIN)), what)


def _fit_gpu(
    job: Job, load: estimate.Workload, limit: int | None
) -> tuple[int, estimate.Workload, bool, int]:
    """Tasks in a batch, the workload in parts if need be, whether to overlap, estimated peak."""
    from fda_fast.job import free_memory

    room = limit if limit is not None else int(_SHARE_OF_FREE * free_memory(job.device))

    def need(load: estimate.Workload, batch: int = 1, overlap: bool = False) -> tuple[int, str]:
        precision = job.settings.precision
        found = (
            (estimate.layer_memory(spec, load, group=batch, gpu_precision=precision), spec.name)
            for spec in job.layers
        )
        return max((_on_gpu(memory, overlap), name) for memory, name in found)

    for overlap in (True, False):
        for batch in range(load.tasks if load.optimises else 1, 0, -1):
            found, _ = need(load, batch, overlap)
            # A larger batch gains more than reading ahead hides, down to half of the tasks.
            if found <= room and (not overlap or 2 * batch >= load.tasks):
                return batch, load, overlap, found
    load = _in_parts(load, room, lambda load: need(load)[0])
    least, name = need(load)
    if limit is not None and least > limit:
        held = "one task's anchors" if load.part is None else f"{load.part} anchors of one task"
        raise InputError(
            f"max_gpu_memory {shown(limit)} is too small for layer {name}",
            expected=f"at least {shown(least)}: one layer of all models and {held}",
            got=shown(limit),
            fix="Give more, use fewer experts, or --device cpu",
        )
    return 1, load, False, least


def _on_gpu(need: estimate.LayerMemory, overlap: bool) -> int:
    held = 2 * need.held + need.saved if overlap else need.held
    return int((held + need.work) * (1 + _MARGIN))


def enforce(job: Job, max_memory: int | None, max_gpu_memory: int | None) -> None:
    """Make the allocators keep the limits as far as they can."""
    if max_memory is not None:
        give_back_at_once()
    if max_gpu_memory is not None and job.device.type == "cuda":
        total = torch.cuda.get_device_properties(job.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_gpu_memory / total), job.device)
