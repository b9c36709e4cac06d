"""What a merge would take, layer by layer, before any weight is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fda_fast.checkpoints.align import ExpertView, Vocabulary, match_expert
from fda_fast.checkpoints.identity import check_differs
from fda_fast.checkpoints.layout import LayerSpec, ModelLayout, Scope
from fda_fast.checkpoints.outputs import check_disk, check_output
from fda_fast.checkpoints.reader import Checkpoint

# Matrix products a construction step makes per weight, in units of 2 * rows * in * out
# operations: 25 for the 3 weights of a SwiGLU MLP, 102 for the 12 units of a ViT block.
_CONSTRUCT_PRODUCTS = 8.5
# The attention core per step: 24 products of 2 * rows * tokens * width.
_ATTENTION_PRODUCTS = 24
# An adaptation step is first order: forward of two differences, backward to weights and inputs.
_ADAPT_PRODUCTS = 4
# float32 copies a layer of one expert takes: fine-tuned, task vector, coefficient and two moments.
_COPIES_PER_EXPERT = 5
# The anchors, their best snapshot, gradient, two moments, and what a sweep hands on.
_COPIES_OF_ANCHORS = 6
# Values kept per row at every linear map: x, dx, g, t, and S, b on the way back.
_KEPT_PER_ROW = 6
# Everything that is not a matrix product, relative to those, measured on two cores.
_OVERHEAD = 1.5


@dataclass(frozen=True)
class PlanRow:
    """One layer of a plan.

    Attributes:
        layer: its name.
        kind: its class.
        parameters: number of them.
        anchors: shape of one expert's anchors, [n, T, d] or [n, d].
        memory_bytes: peak while this layer is worked on, all experts together; an estimate.
        gflop_per_step: operations of one construction step, all experts together, in 10^9.
        seconds: construction and adaptation of the layer; an estimate, within a factor of 2 to 3.
    """

    layer: str
    kind: str
    parameters: int
    anchors: tuple[int, ...]
    memory_bytes: int
    gflop_per_step: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A merge, checked and estimated. Use ``Plan.of`` or ``Plan.open``.

    Attributes:
        base: the base model.
        layout: its layers.
        experts: the experts, in order.
        rows: one per layer.
        notes: what was found and accepted.
        memory_bytes: the largest of the rows'.
        disk_bytes: what the output takes, and the work on the way to it.
        gflops: 10^9 operations a second the estimates of time are made with.
    """

    base: Checkpoint
    layout: ModelLayout
    experts: list[ExpertView]
    rows: list[PlanRow]
    notes: list[str]
    memory_bytes: int
    disk_bytes: int
    gflops: float

    @property
    def seconds(self) -> float:
        """Estimated time of the whole merge."""
        return sum(row.seconds for row in self.rows)

    @classmethod
    def open(
        cls,
        base: str | Path,
        experts: Mapping[str, str | Path],
        output: str | Path | None,
        *,
        shape: Callable[[LayerSpec], tuple[int, ...]],
        steps: int,
        epochs: int = 0,
        scope: Scope = "auto",
        vocabulary: Vocabulary = "base",
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        gflops: float | None = None,
    ) -> Plan:
        """Open and match everything, then plan it.

        Args:
            base: the base model.
            experts: {name: checkpoint or adapter}.
            output: the directory to write; None plans without one.
            scope, vocabulary: as ``ModelLayout.from_checkpoint`` and ``match_expert``.
            shape, steps, epochs, dtype, device, gflops: as ``of``.

        Raises:
            InputError: anything wrong with the inputs or the output.
        """
        if output is not None:
            check_output(Path(output).absolute())
        opened = Checkpoint.open(base, "base model")
        layout = ModelLayout.from_checkpoint(opened, scope)
        views = [
            match_expert(
                opened, Checkpoint.open(path, f"expert {name}"), layout, vocabulary=vocabulary
            )
            for name, path in experts.items()
        ]
        return cls.of(
            layout,
            views,
            output,
            shape=shape,
            steps=steps,
            epochs=epochs,
            dtype=dtype,
            device=device,
            gflops=gflops,
        )

    @classmethod
    def of(
        cls,
        layout: ModelLayout,
        experts: Sequence[ExpertView],
        output: str | Path | None,
        *,
        shape: Callable[[LayerSpec], tuple[int, ...]],
        steps: int,
        epochs: int = 0,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        gflops: float | None = None,
    ) -> Plan:
        """Plan a merge of checkpoints that are open already.

        Args:
            layout: the base's layers.
            experts: from ``match_expert``.
            output: the directory to write; None leaves out the checks of it.
            shape: shape of one expert's anchors of a layer, [n, T, d] or [n, d].
            steps: construction steps.
            epochs: adaptation's passes over all anchors.
            dtype: of the written tensors; None: the base's.
            device: where layers are computed.
            gflops: speed to estimate times with; None measures it (0.3 s).

        Raises:
            InputError: an expert identical to the base; output not empty, disk too small.

        Cost: headers, and a few tensors of every expert for the comparison with the base.
        """
        for view in experts:
            check_differs(view, layout)
        speed = measure_gflops(device) if gflops is None else gflops
        rows = [
            _row(spec, shape(spec), len(experts), steps, epochs, speed) for spec in layout.layers
        ]
        disk = _disk_bytes(layout, rows, len(experts), dtype)
        if output is not None:
            target = Path(output).absolute()
            check_output(target)
            check_disk(target, disk)
        notes = [*layout.notes]
        for view in experts:
            notes += view.notes
        memory = max((row.memory_bytes for row in rows), default=0)
        return cls(layout.base, layout, list(experts), rows, notes, memory, disk, speed)


def measure_gflops(device: str | torch.device = "cpu", seconds: float = 0.3) -> float:
    """Speed of float32 matrix products of a layer's size, in 10^9 operations a second.

    Args:
        device: where to measure.
        seconds: how long to.
    """
    rows, width = 512, 1024
    x = torch.ones(rows, width, device=device)
    w = torch.ones(width, width, device=device)
    out = torch.empty(rows, width, device=device)

    def run(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            torch.mm(x, w, out=out)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - begun

    once = max(run(3) / 3, 1e-6)
    count = max(1, int(seconds / 3 / once))
    best = min(run(count) / count for _ in range(3))
    return 2.0 * rows * width * width / best / 1e9


def _row(
    spec: LayerSpec, anchors: tuple[int, ...], k: int, steps: int, epochs: int, gflops: float
) -> PlanRow:
    rows = anchors[0] * (anchors[1] if len(anchors) == 3 else 1)
    matrices = [s for s in spec.shapes.values() if len(s) == 2]
    product = 2.0 * rows * sum(a * b for a, b in matrices)
    attention = 0.0
    if spec.scope == "block" and len(anchors) == 3:
        attention = _ATTENTION_PRODUCTS * 2.0 * rows * anchors[1] * spec.width
    step = k * (_CONSTRUCT_PRODUCTS * product + attention)
    adapt = epochs * k * (_ADAPT_PRODUCTS * product + attention / 4)
    memory = 4 * spec.numel * (2 + _COPIES_PER_EXPERT * k)
    memory += 4 * k * rows * spec.width * _COPIES_OF_ANCHORS
    memory += 4 * k * rows * sum(a + b for a, b in matrices) * _KEPT_PER_ROW
    seconds = _OVERHEAD * (steps * step + adapt) / (gflops * 1e9)
    return PlanRow(spec.name, spec.kind, spec.numel, anchors, memory, step / 1e9, seconds)


def _disk_bytes(
    layout: ModelLayout, rows: Sequence[PlanRow], k: int, dtype: torch.dtype | None
) -> int:
    """The output, and beside it until it is written: merged layers in float32, and anchors."""
    output = 0
    for name, info in layout.base.names.items():
        if name not in layout.tied:
            wider = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
            output += info.numel * wider.itemsize
    layers = 4 * sum(spec.numel for spec in layout.layers)
    anchors = 4 * k * sum(torch.Size(row.anchors).numel() for row in rows)
    return output + layers + anchors
