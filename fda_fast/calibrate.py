"""How fast this machine does the very steps of a merge: a few of them, timed on random weights."""

from __future__ import annotations

import copy
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fda_fast import estimate
from fda_fast.adapt import adapt
from fda_fast.checkpoints.align import check_finite
from fda_fast.checkpoints.hashing import hash_tensors
from fda_fast.checkpoints.repeated import input_width
from fda_fast.construct import construct
from fda_fast.layers.engine import bind
from fda_fast.starting import merge_tensor

if TYPE_CHECKING:
    from fda_fast.checkpoints.layout import LayerSpec
    from fda_fast.job import Job

STEPS = 3
_SECONDS_PER_STEP = 3.0
_SHARE_OF_MEMORY = 0.4
_STAND_IN_WIDTH, _STAND_IN_INNER = 1024, 2816
_LARGEST_MATRIX = 1024
_FILE_SAMPLE = 32 << 20
ASSUMED_READ, ASSUMED_WRITE = 1e9, 0.5e9
"""Bytes a second where no file is at hand to measure with."""


@dataclass(frozen=True)
class Speed:
    """What was measured, all in seconds of this machine.

    Attributes:
        layer: the layer that was timed, "" for a stand-in where the layers do not fit.
        construct_step, adapt_step: seconds per 10^9 operations of a step.
        construct_setup, adapt_setup: seconds per parameter, once per task or layer.
        prepare: seconds per byte of a float32 layer: conversion, checks, hashes.
        start: seconds per operation of the starting point, None without one.
        read, write: bytes a second.
        assumed_read, assumed_write: whether that rate is an assumption.
        gflops: 10^9 operations a second that the construction step reached.
    """

    layer: str
    construct_step: float
    adapt_step: float
    construct_setup: float
    adapt_setup: float
    prepare: float
    start: float
    read: float
    write: float
    assumed_read: bool
    assumed_write: bool
    gflops: float


def calibrate(job: Job, load: estimate.Workload, output: Path | None = None) -> Speed:
    """Time the steps of a merge's largest layer, with its settings and random weights.

    Args:
        job: the merge; its checkpoints' bytes are not needed.
        load: what it asks of every layer.
        output: where it will be written, to time writing there.

    Cost: 5 to 20 s, and the memory of one layer of two models; a layer of which that does not fit
    into the memory that is free is replaced by a smaller one.
    """
    from fda_fast.job import free_memory

    largest = max(job.layers, key=lambda spec: spec.numel)
    spec: LayerSpec | _StandIn = largest
    alone = replace(load, tasks=1, coefficients=min(1, load.coefficients))
    need = estimate.layer_memory(spec, alone).total(overlap=False)
    build: Callable[[], nn.Module]
    if need > _SHARE_OF_MEMORY * free_memory(job.device):
        spec = _StandIn()
        build = spec.build
    else:
        build = _builder(job, largest)
    layer = build().to(job.device)
    tuned = _moved(layer)
    prepare = _time_preparation(layer, tuned)
    setup, step, rows = _time_construction(job, load, spec, layer, tuned)
    flop = estimate.construct_flop(spec, replace(load, tasks=1, anchors=rows, part=None))
    adapt_setup, adapt_step = _time_adaptation(job, load, spec, layer, tuned)
    batch = min(load.batch_size, load.tasks * load.anchors)
    adapt_flop = estimate.adapt_flop(spec, replace(load, tasks=1, anchors=batch))
    read, write = _time_read(job), _time_write(output)
    return Speed(
        layer=getattr(spec, "name", ""),
        construct_step=1e9 * step / flop,
        adapt_step=1e9 * adapt_step / adapt_flop,
        construct_setup=setup / spec.numel,
        adapt_setup=adapt_setup / spec.numel,
        prepare=prepare,
        start=_time_start(job, load) if load.starts else 0.0,
        read=read or ASSUMED_READ,
        write=write or ASSUMED_WRITE,
        assumed_read=read is None,
        assumed_write=write is None,
        gflops=flop / step / 1e9,
    )


@dataclass(frozen=True)
class _StandIn:
    """A SwiGLU MLP that fits everywhere."""

    scope: str = "mlp"
    width: int = _STAND_IN_WIDTH

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        inner, width = _STAND_IN_INNER, self.width
        return {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}

    @property
    def numel(self) -> int:
        return 3 * _STAND_IN_INNER * self.width

    def build(self) -> nn.Module:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        config = LlamaConfig(hidden_size=self.width, intermediate_size=_STAND_IN_INNER)
        return LlamaMLP(config).float().eval()


def _builder(job: Job, spec: LayerSpec) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for local, name in spec.tensors.items():
            info = job.base.names[name]
            if local in spec.parameters and info.dtype.is_floating_point:
                tensor = torch.empty(spec.shapes[local]).uniform_(-0.03, 0.03, generator=generator)
                one = len(info.shape) == 1 and local.endswith("weight")
                tensors[local] = tensor.add_(1) if one else tensor
            else:
                tensors[local] = torch.zeros(info.shape, dtype=info.dtype)
        return job.layout.build(spec, tensors)

    return build


@torch.no_grad()
def _moved(layer: nn.Module) -> nn.Module:
    """A fine-tune: one per cent away."""
    tuned = copy.deepcopy(layer)
    for parameter in tuned.parameters():
        noise = torch.empty_like(parameter).uniform_(-1, 1)
        parameter.add_(noise.mul_(0.01 * parameter.norm() / noise.norm()))
    return tuned


def _time_preparation(layer: nn.Module, tuned: nn.Module) -> float:
    """Seconds per byte between the file and the layer: conversion, checks, hash."""
    begun = time.perf_counter()
    for name, parameter in tuned.named_parameters():
        stored = parameter.detach().bfloat16()
        check_finite(name, stored, "calibration")
        stored.float()
    hash_tensors(dict(layer.named_parameters()))
    total = sum(p.numel() for p in layer.parameters())
    return (time.perf_counter() - begun) / (estimate.FLOAT * total)


def _time_construction(
    job: Job,
    load: estimate.Workload,
    spec: LayerSpec | _StandIn,
    layer: nn.Module,
    tuned: nn.Module,
) -> tuple[float, float, int]:
    """Seconds before the first step, per step, and the number of anchors they were timed with."""
    settings = job.settings
    wanted = settings.construct
    tokens = wanted.tokens if spec.scope == "block" else None
    few = min(8, load.part or 8)
    # First a few anchors, to know how many can be afforded.
    _, once = _construct(job, layer, tuned, few, tokens)
    affordable = max(few, int(few * _SECONDS_PER_STEP / once))
    count = min(load.held, affordable)
    setup, step = _construct(job, layer, tuned, count, tokens)
    return setup, step, count


def _construct(
    job: Job, layer: nn.Module, tuned: nn.Module, count: int, tokens: int | None
) -> tuple[float, float]:
    settings = job.settings
    wanted = settings.construct
    width = input_width(layer)
    shape = (count, tokens, width) if tokens else (count, width)
    start = torch.empty(shape).normal_(0, 0.05).to(next(layer.parameters()).device)
    stamps = [time.perf_counter()]
    # The checks of a program against autograd depend on the layer alone.
    bind(
        layer,
        [tuned],
        shape=shape,
        distance=wanted.distance,
        engine=settings.engine,
        precision=settings.precision,
    )
    stamps.append(time.perf_counter())
    ticks: list[float] = []

    def tick(step: int, loss: Tensor, cosines: Tensor) -> None:
        loss.sum().item()  # waits for the device
        ticks.append(time.perf_counter())

    construct(
        layer,
        [tuned],
        [start],
        steps=STEPS,
        distance=wanted.distance,
        engine=settings.engine,
        precision=settings.precision,
        progress=False,
        on_step=tick,
    )
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    return stamps[1] - stamps[0], max(1e-6, statistics.median(steps))


def _time_adaptation(
    job: Job,
    load: estimate.Workload,
    spec: LayerSpec | _StandIn,
    layer: nn.Module,
    tuned: nn.Module,
) -> tuple[float, float]:
    """Seconds before the first step of adaptation and after the last, and per step."""
    settings = job.settings
    wanted = settings.adapt
    tokens = settings.construct.tokens if spec.scope == "block" else None
    count = min(load.batch_size, load.tasks * load.anchors)
    width = input_width(layer)
    shape = (count, tokens, width) if tokens else (count, width)
    anchors = torch.empty(shape).normal_(0, 0.05).to(next(layer.parameters()).device)
    start: list[tuple[nn.Module | Mapping[str, Tensor], float]] | None = None
    if wanted.mode == "coefficients":
        start = [(tuned, 0.3)] * max(1, load.coefficients)
    ticks: list[float] = []

    def tick(epoch: int, loss: Tensor) -> None:
        loss.item()
        ticks.append(time.perf_counter())

    begun = time.perf_counter()
    adapt(
        layer,
        [(anchors, tuned)],
        mode=wanted.mode,
        start=start,
        epochs=STEPS,
        batch_size=count,
        distance=wanted.distance,
        engine=settings.engine,
        precision=settings.precision,
        part=load.part,
        on_epoch=tick,
    )
    ended = time.perf_counter()
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    step = max(1e-6, statistics.median(steps))
    return max(0.0, ended - begun - STEPS * step), step


def start_flop(shape: tuple[int, ...], tasks: int) -> float:
    """Operations that the starting points' decompositions grow with."""
    if len(shape) != 2:
        return float(tasks * math.prod(shape))
    return float(tasks * math.prod(shape) * min(shape))


def _time_start(job: Job, load: estimate.Workload) -> float:
    """Seconds per operation of the starting point, on one matrix of at most 1024 x 1024."""
    settings = job.settings
    largest = max(job.layers, key=lambda spec: spec.numel)
    shape = max(largest.shapes.values(), key=math.prod)
    small = tuple(min(size, _LARGEST_MATRIX) for size in shape)
    pretrained = torch.empty(small).normal_(0, 0.02).to(job.device)
    deltas = [0.01 * torch.empty(small).normal_(0, 0.02).to(job.device) for _ in range(load.tasks)]
    assert settings.start != "pretrained"
    begun = time.perf_counter()
    merge_tensor(
        settings.start,
        next(iter(largest.parameters.values())),
        pretrained,
        deltas,
        scaling=settings.starting.scaling,
        rules=settings.starting.rules,
        steps=settings.starting.steps,
        lr=settings.starting.lr,
    )
    return (time.perf_counter() - begun) / start_flop(small, load.tasks)


def _time_read(job: Job) -> float | None:
    """Bytes a second from the base's files; None where they are not here."""
    name = max(job.base.names, key=lambda name: job.base.names[name].nbytes)
    info = job.base.names[name]
    if job.base.directory is None or not info.file.is_file():
        return None
    begun = time.perf_counter()
    with open(info.file, "rb", buffering=0) as stream:
        got = len(stream.read(_FILE_SAMPLE))
    return got / max(1e-6, time.perf_counter() - begun)


def _time_write(output: Path | None) -> float | None:
    """Bytes a second to the disk of the output; None where nobody has said which."""
    if output is None:
        return None
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    content = bytes(_FILE_SAMPLE)
    with tempfile.TemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _FILE_SAMPLE / max(1e-6, time.perf_counter() - begun)
