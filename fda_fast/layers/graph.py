"""The construction step on the device: static buffers, and one CUDA graph replayed per step.

A step of a small layer is hundreds of launches of a few microseconds each, more than the host can
issue in the time the card needs for them. Recorded once as a CUDA graph, it is one launch.

    optimiser = AnchorOptimiser(problem, start, steps=1200, lr=1e-2, ...)
    run = step_runner(optimiser.step, start.device)
    for _ in range(1200):
        run()
    optimiser.best_anchors, optimiser.best_loss, optimiser.history      # read when wanted
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fda_fast.ops import adamw

if TYPE_CHECKING:
    from fda_fast.layers.engine import Problem

_log = logging.getLogger("fda_fast")

# Steps run as they are before the recording: they load modules, fill caches of tensors that live on
# (segment starts, workspaces of the matrix library), and take the decisions that need a clock.
_EAGER_STEPS = 3


class AnchorOptimiser:
    """Anchors of K tasks under AdamW, with everything a step reads or writes in static buffers.

    Args:
        problem: gives loss, gradient and cosines at the anchors.
        start: [K, n, (T,) d]; copied.
        steps: rows of the loss history; further steps start over at its first row.
        lr: learning rate.
        betas: decay of AdamW's moments.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay of the anchors.

    Attributes:
        anchors: the current ones, not yet evaluated.
        best_anchors: those with the lowest loss among the evaluated ones.
        best_loss: [K], their loss; infinite before the first step.
        best_cosines: [K, P], their cosines.
        cosines: [K, P], those of the last evaluation.
        history: [steps, K], the loss at each step; NaN where there was none yet.
    """

    def __init__(
        self,
        problem: Problem,
        start: Tensor,
        *,
        steps: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self._problem = problem
        self._settings: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        tasks = len(start)
        self.anchors = start.detach().clone(memory_format=torch.contiguous_format)
        self.best_anchors = self.anchors.clone()
        self.best_loss = start.new_full((tasks,), math.inf)
        self.best_cosines = start.new_zeros((tasks, len(problem.parameter_names)))
        self.cosines = torch.zeros_like(self.best_cosines)
        self.history = start.new_full((steps, tasks), math.nan)
        self._exp_avg = torch.zeros_like(self.anchors)
        self._exp_avg_sq = torch.zeros_like(self.anchors)
        self._done = 0
        # On a card the count is the device's, so that a replayed graph advances it.
        self._count = None
        if start.is_cuda:
            self._count = torch.zeros((), dtype=torch.int64, device=start.device)

    def step(self) -> None:
        """Evaluate the anchors, keep the best, record the loss, update; no host synchronisation."""
        if self._count is None:
            self._done += 1
            count: int | Tensor = self._done
        else:
            count = self._count.add_(1)
        result = self._problem.evaluate(self.anchors)
        self.cosines.copy_(result.cosines)
        better = (result.loss < self.best_loss).unsqueeze(1)
        torch.where(better, result.cosines, self.best_cosines, out=self.best_cosines)
        adamw.step_(
            self.anchors,
            result.grad,
            self._exp_avg,
            self._exp_avg_sq,
            count,
            result.loss,
            self.best_loss,
            self.best_anchors,
            history=self.history,
            **self._settings,
        )


def step_runner(step: Callable[[], None], device: torch.device | str) -> Callable[[], None]:
    """A callable that performs ``step`` exactly once per call, as a CUDA graph where that works.

    On the CPU it is ``step`` itself. On a card the first calls run ``step`` on a side stream, one
    call records it, and from then on a call is one replay. If recording fails (a layer that
    synchronises with the host, say), a warning says why and the steps go on as before.

    Args:
        step: reads and writes tensors that outlive the runner and never change their storage;
            temporaries are free. Everything that changes from step to step, the step count
            included, is a tensor on the device. It neither reads from the device nor branches on
            the host.
        device: where ``step`` runs.

    Returns:
        A function without arguments. Results are ordered on the stream that is current at the call.

    Cost: the temporaries of one step stay reserved as long as the runner lives.
    """
    device = torch.device(device)
    return _GraphRunner(step, device) if device.type == "cuda" else step


class _Streams(threading.local):
    """Streams by device, of one thread."""

    def __init__(self) -> None:
        self.known: dict[torch.device, torch.cuda.Stream] = {}


_streams = _Streams()


def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which this thread records the steps of a device; always the same.

    torch keeps a workspace of the matrix library, 32 MiB on an H100, for every stream that ever
    multiplied: a stream for each layer of a merge would add up to a gigabyte.
    """
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _streams.known:
        _streams.known[device] = torch.cuda.Stream(device)
    return _streams.known[device]


class _GraphRunner:
    """One recorded step of one device."""

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._stream = _recording_stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = _EAGER_STEPS

    def __call__(self) -> None:
        with torch.cuda.device(self._device):
            if self._graph is None and self._eager <= 0:
                self._record()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._run_aside()
                self._eager -= 1

    def _run_aside(self) -> None:
        """The step as it is, on the stream that will record it."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step()
        current.wait_stream(self._stream)

    def _record(self) -> None:
        """Record the step without running it; on failure stay with single launches for good."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            # thread_local: other threads may read the next layer onto the card meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            # Ending a recording that something broke raises again, and says less.
            why = error.__context__ or error
            _log.warning("a step cannot be recorded as a CUDA graph, running it as is: %s", why)
            self._eager = 1 << 62
            return
        self._graph = graph
