"""Binding layers to an engine: what construct() and adapt() see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from fda_fast.errors import InputError
from fda_fast.layers.autograd import AutogradAdaptation, AutogradProblem
from fda_fast.layers.evaluation import Evaluation
from fda_fast.layers.precision import resolve

ENGINES = ("auto", "program", "autograd")


class Problem(Protocol):
    """Alignment of K tasks of one layer."""

    parameter_names: list[str]

    def evaluate(self, anchors: Tensor) -> Evaluation:
        """Loss, gradient and cosines at anchors [K, n, (T,) d]; no host synchronisation."""


class AdaptationProblem(Protocol):
    """Fitting one layer to the anchors of all tasks."""

    parameter_names: list[str]
    deltas: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    size: int

    def refresh(self) -> None:
        """Take note that the optimiser changed ``deltas``."""

    def evaluate(self, index: Tensor) -> Tensor:
        """Summed loss of the anchors ``index`` [B]; fills ``gradients``."""


def bind(
    pretrained: nn.Module,
    finetuned: Sequence[nn.Module],
    *,
    shape: tuple[int, ...],
    distance: str = "cosine",
    engine: str = "auto",
    precision: str = "auto",
) -> Problem:
    """The alignment problem of K fine-tuned layers, for anchors of ``shape`` [n, (T,) d]."""
    _check(engine, precision)
    return AutogradProblem(pretrained, finetuned, distance=distance)


def bind_adaptation(
    pretrained: nn.Module,
    tasks: Sequence[tuple[Tensor, nn.Module]],
    *,
    distance: str = "cosine",
    engine: str = "auto",
    precision: str = "auto",
) -> AdaptationProblem:
    """The adaptation problem of one layer over (anchors, fine-tuned layer) of every task."""
    _check(engine, precision)
    return AutogradAdaptation(pretrained, tasks, distance=distance)


def _check(engine: str, precision: str) -> None:
    if engine not in ENGINES:
        raise InputError("engine", expected=" | ".join(ENGINES), got=repr(engine))
    resolve(precision, "cpu")
