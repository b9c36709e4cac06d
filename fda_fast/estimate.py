"""What one layer takes, from shapes alone: memory, operations, bytes.

Memory is counted in float32 copies of the layer's parameters and in values per row of anchors. The
counts were read off the code and fitted to measured peaks (MLPs of width 1024 to 2048, blocks of
width 768); ``tests/test_budget.py`` holds them against a real merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

FLOAT = 4

# Construction of one task: its program checked once against autograd, then the steps.
_COPIES_CHECK = {"mlp": 3.7, "block": 4.1}
_COPIES_SHARED = 1.0  # packed pretrained weights
_COPIES_TASK = 2.0  # task vector and G
_COPIES_TUNED = 1.0  # fine-tuned weights, packed where several tasks are one batch
_ROW_VALUES = {"mlp": 4.6, "block": 4.1}  # per row and (in + out) of every matrix
_ANCHOR_COPIES = 5  # anchors, best ones, two moments, gradient
# Attention weights kept per head; heads are mostly 64 wide.
_ATTENTION_VALUES, _HEAD = 6, 64
# On a GPU no attention weights are kept, and bf16 holds its operands in two bytes, beside float32
# values; tests/test_gpu_dry_run.py holds these against the tensors of a step, counted.
_GPU_SHARED = {"fp32": 0.67, "tf32": 0.67, "bf16": 0.5}
_GPU_TASK = {"fp32": 2.0, "tf32": 2.0, "bf16": 1.17}
_GPU_TUNED = {"fp32": 1.0, "tf32": 1.0, "bf16": 0.18}
_GPU_ROW_VALUES = {
    "mlp": {"fp32": 3.65, "tf32": 3.65, "bf16": 3.6},
    "block": {"fp32": 3.1, "tf32": 3.1, "bf16": 2.95},
}
# Adaptation: deltas, gradients, live weights, Adam and the result; and per coefficient vector.
_COPIES_ADAPT, _COPIES_COEFFICIENT = 6.9, 2.0
_ADAPT_ROW_VALUES, _TARGET_COPIES = 2.7, 2.5

# Matrix products in units of 2 * rows * in * out operations: a construction step makes 25 for the 3
# weights of a SwiGLU MLP, 102 for the 12 units of a ViT block; an adaptation step is first order.
_CONSTRUCT_PRODUCTS, _ADAPT_PRODUCTS = 8.5, 4
# The attention core per construction step: 24 products of 2 * rows * tokens * width.
_ATTENTION_PRODUCTS = 24
# Forward and backward, which anchors in parts need twice: 2 products of each matrix that reads the
# anchors, 4 of the others; 11 of the attention core.
_AGAIN_PRODUCTS = {"mlp": 8 / 3, "block": 3.5}
_AGAIN_ATTENTION = 11


class Shapes(Protocol):
    """The part of a ``LayerSpec`` that counts here."""

    @property
    def scope(self) -> str:
        """ "block" or "mlp"."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters, by name in the layer."""

    @property
    def numel(self) -> int:
        """Number of parameters."""

    @property
    def width(self) -> int:
        """Size of the vectors the layer takes."""


@dataclass(frozen=True)
class Workload:
    """What a merge asks of every layer.

    Attributes:
        tasks: experts K.
        anchors: n per task.
        tokens: T per anchor; 1 for single vectors.
        steps: of construction.
        epochs: of adaptation.
        batch_size: anchors in an adaptation step.
        coefficients: vectors of coefficients adapted: 0 (all weights are), 1, or K.
        optimises: False for a starting point alone.
        starts: whether a starting point is computed.
        snapshots: models kept from earlier epochs beside the last one.
        part: anchors of a task that a step holds at once; None for all.
    """

    tasks: int
    anchors: int = 1
    tokens: int = 1
    steps: int = 0
    epochs: int = 0
    batch_size: int = 128
    coefficients: int = 0
    optimises: bool = True
    starts: bool = False
    snapshots: int = 0
    part: int | None = None

    @property
    def rows(self) -> int:
        """Rows of one task's anchors, n * T."""
        return self.anchors * self.tokens

    @property
    def held(self) -> int:
        """Anchors of one task that a step holds at once."""
        return min(self.anchors, self.part or self.anchors)

    @property
    def repeated(self) -> float:
        """The share of anchors that forward and backward are made of twice: all parts but one."""
        parts = math.ceil(self.anchors / self.held)
        return (parts - 1) / parts

    @property
    def adapt_steps(self) -> int:
        """Adaptation steps of a layer."""
        return self.epochs * math.ceil(self.tasks * self.anchors / self.batch_size)


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer at its peak.

    Attributes:
        held: the layer of the base and of every expert.
        stored: what is held beside it while it is read: tensors in the dtype of the files.
        work: the larger of construction and adaptation.
        saved: a merged layer on its way to the disk.
    """

    held: int
    stored: int
    work: int
    saved: int

    def total(self, overlap: bool) -> int:
        """Expected peak, with the next layer being read and the last one saved meanwhile, or not.

        The next layer is mostly there before the current one is at its peak, so ``stored`` does
        not come on top.
        """
        if not overlap:
            return self.held + max(self.stored, self.work)
        return 2 * self.held + self.work + self.saved

    def bound(self, overlap: bool) -> int:
        """Peak whatever the order in which things happen."""
        return self.total(overlap) + (self.stored if overlap else 0)


def parameter_bytes(layer: Shapes) -> int:
    """A layer in float32."""
    return FLOAT * layer.numel


def _widths(layer: Shapes) -> int:
    return sum(sum(shape) for shape in layer.shapes.values() if len(shape) == 2)


def _products(layer: Shapes) -> int:
    return sum(math.prod(shape) for shape in layer.shapes.values() if len(shape) == 2)


def _attends(layer: Shapes, load: Workload) -> bool:
    return layer.scope == "block" and load.tokens > 1


def construct_bytes(
    layer: Shapes, load: Workload, group: int = 1, gpu_precision: str | None = None
) -> int:
    """What construction of ``group`` tasks in one batch holds beside the layers themselves."""
    copy, rows = parameter_bytes(layer), load.held * load.tokens
    shared, task, tuned = _COPIES_SHARED, _COPIES_TASK, _COPIES_TUNED
    values = _ROW_VALUES[layer.scope]
    if gpu_precision is not None:
        shared, task = _GPU_SHARED[gpu_precision], _GPU_TASK[gpu_precision]
        tuned = _GPU_TUNED[gpu_precision]
        values = _GPU_ROW_VALUES[layer.scope][gpu_precision]
    steps = copy * (shared + group * (task + (tuned if group > 1 else 0.0)))
    steps += FLOAT * group * rows * _widths(layer) * values
    if _attends(layer, load) and gpu_precision is None:
        heads = max(1, layer.width // _HEAD)
        steps += FLOAT * group * rows * load.tokens * heads * _ATTENTION_VALUES
    check = copy * (_COPIES_CHECK[layer.scope] + 2 * (group - 1))
    return int(max(check, steps) + FLOAT * group * load.rows * layer.width * _ANCHOR_COPIES)


def adapt_bytes(layer: Shapes, load: Workload) -> int:
    """What adaptation holds beside the layers themselves and all anchors."""
    copy = parameter_bytes(layer)
    found = copy * (_COPIES_ADAPT + _COPIES_COEFFICIENT * load.coefficients + load.snapshots)
    batch = min(load.batch_size, load.tasks * load.anchors)
    batch = min(batch, load.part or batch) * load.tokens
    found += FLOAT * batch * _widths(layer) * _ADAPT_ROW_VALUES
    found += FLOAT * load.tasks * load.rows * layer.width * _TARGET_COPIES
    return int(found)


def start_bytes(layer: Shapes, load: Workload) -> int:
    """What merging a layer's tensors by a starting point holds beside their task vectors."""
    largest = max((math.prod(shape) for shape in layer.shapes.values()), default=0)
    return parameter_bytes(layer) + FLOAT * largest * (load.tasks + 6)


def layer_memory(
    layer: Shapes,
    load: Workload,
    *,
    itemsize: int = FLOAT,
    group: int = 1,
    gpu_precision: str | None = None,
) -> LayerMemory:
    """Peak memory of one layer.

    Args:
        layer: its shapes.
        load: the merge.
        itemsize: bytes per stored element.
        group: tasks constructed in one batch.
        gpu_precision: of the products, "auto" meaning bf16, if the work is a GPU's; None on a CPU.
    """
    copy = parameter_bytes(layer)
    precision = "bf16" if gpu_precision == "auto" else gpu_precision
    # Tensors stored in float32 are taken as they are; others exist in both forms while converted.
    stored = 0 if itemsize == FLOAT else 2 * itemsize * layer.numel
    work = 0
    if load.optimises:
        work = max(construct_bytes(layer, load, group, precision), adapt_bytes(layer, load))
        work += FLOAT * load.tasks * load.rows * layer.width
    if load.starts or not load.optimises:
        work = max(work, start_bytes(layer, load))
    return LayerMemory((1 + load.tasks) * copy, stored, work, (1 + load.snapshots) * copy)


def tensor_memory(
    numel: int, itemsize: int, load: Workload, *, merged: bool, summed: bool, overlap: bool
) -> int:
    """Peak memory while a tensor outside the layers is read, merged if so, and written.

    Task Arithmetic only sums (``summed``); the others decompose or optimise all task vectors.
    """
    if merged:
        held = FLOAT * numel * (load.tasks + 1)
        work = FLOAT * numel * (2 if summed else load.tasks + 6)
        return held * (2 if overlap else 1) + work
    return numel * max(itemsize, 1) * (5 if overlap else 3)


def construct_flop(layer: Shapes, load: Workload) -> float:
    """Operations of one construction step of all tasks."""
    products = _CONSTRUCT_PRODUCTS + load.repeated * _AGAIN_PRODUCTS[layer.scope]
    step = products * 2.0 * load.rows * _products(layer)
    if _attends(layer, load):
        products = _ATTENTION_PRODUCTS + load.repeated * _AGAIN_ATTENTION
        step += products * 2.0 * load.rows * load.tokens * layer.width
    return load.tasks * step


def adapt_flop(layer: Shapes, load: Workload) -> float:
    """Operations of one pass of adaptation over the anchors of all tasks."""
    step = _ADAPT_PRODUCTS * 2.0 * load.rows * _products(layer)
    if _attends(layer, load):
        step += _ATTENTION_PRODUCTS / 4 * 2.0 * load.rows * load.tokens * layer.width
    return load.tasks * step
