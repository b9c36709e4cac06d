"""Binding layers to an engine: what construct() and adapt() see."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fda_fast.errors import InputError
from fda_fast.layers.adaptation import ProgramAdaptation
from fda_fast.layers.autograd import (
    AutogradAdaptation,
    AutogradProblem,
    check_same_anchor_shapes,
    check_same_parameters,
)
from fda_fast.layers.evaluation import Evaluation
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision, resolve
from fda_fast.layers.problem import ProgramProblem
from fda_fast.layers.recognise import NotRecognised, Recipe, recognise
from fda_fast.layers.verify import Mismatch, verify
from fda_fast.ops import similarity

ENGINES = ("auto", "program", "autograd")

_log = logging.getLogger("fda_fast")


class Problem(Protocol):
    """Alignment of K tasks of one layer."""

    parameter_names: list[str]

    def evaluate(self, anchors: Tensor) -> Evaluation:
        """Loss, gradient and cosines at anchors [K, n, (T,) d]; no host synchronisation."""


class AdaptationProblem(Protocol):
    """Fitting one layer to the anchors of all tasks."""

    parameter_names: list[str]
    size: int

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        """theta - theta_0 by parameter name; the optimiser writes into them."""

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """Those of the last evaluation, by parameter name."""

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
    part: int | None = None,
) -> Problem:
    """The alignment problem of K fine-tuned layers, for anchors of ``shape`` [n, (T,) d].

    "auto" takes the four-sweep program if the layer is recognised and its program, run once on a
    little random input, agrees with the layer; else the autograd engine, with one log line saying
    why. "program" raises where "auto" falls back. ``part`` anchors of a task are held at once, None
    for all.

    Raises:
        InputError: unknown engine, precision or distance; layers whose parameters differ; engine
            "program" for a layer that has none, with the reason.
    """
    check_options(engine, precision, distance)
    check_same_parameters(pretrained, finetuned)
    if engine != "autograd":
        try:
            recipe = find_recipe(pretrained, finetuned, len(shape) == 3)
            materials = Materials(
                pretrained,
                finetuned,
                tokens=shape[1] if len(shape) == 3 else 1,
                precision=Precision(precision, device_of(pretrained)),
                dtype=dtype_of(pretrained),
            )
            problem = ProgramProblem(
                recipe.build(materials), materials, distance=distance, part=part
            )
            verify(problem, materials, pretrained, finetuned, shape, distance)
            return problem
        except (NotRecognised, Mismatch) as reason:
            fall_back(engine, pretrained, reason)
    return AutogradProblem(pretrained, finetuned, distance=distance, part=part)


def bind_adaptation(
    pretrained: nn.Module,
    tasks: Sequence[tuple[Tensor, nn.Module]],
    *,
    distance: str = "cosine",
    engine: str = "auto",
    precision: str = "auto",
    part: int | None = None,
) -> AdaptationProblem:
    """The adaptation problem of one layer over (anchors [n, (T,) d], fine-tuned layer) of tasks.

    Engines and errors as for ``bind``.
    """
    check_options(engine, precision, distance)
    finetuned = [layer for _, layer in tasks]
    check_same_parameters(pretrained, finetuned)
    check_same_anchor_shapes([anchors for anchors, _ in tasks])
    if engine != "autograd":
        try:
            shape = tuple(tasks[0][0].shape)
            recipe = find_recipe(pretrained, finetuned, len(shape) == 3)
            # The program is the one of construction: check it as such, in fp32.
            materials = Materials(
                pretrained,
                finetuned[:1],
                tokens=shape[1] if len(shape) == 3 else 1,
                precision=Precision("fp32", device_of(pretrained)),
                dtype=dtype_of(pretrained),
            )
            problem = ProgramProblem(recipe.build(materials), materials, distance=distance)
            verify(problem, materials, pretrained, finetuned[:1], shape, distance)
            del problem, materials
            return ProgramAdaptation(
                recipe.build,
                pretrained,
                tasks,
                distance=distance,
                precision=Precision(precision, device_of(pretrained)),
                dtype=dtype_of(pretrained),
                part=part,
            )
        except (NotRecognised, Mismatch) as reason:
            fall_back(engine, pretrained, reason)
    return AutogradAdaptation(pretrained, tasks, distance=distance, part=part)


def find_recipe(pretrained: nn.Module, finetuned: Sequence[nn.Module], sequences: bool) -> Recipe:
    """The recipe that all the layers share; NotRecognised where there is none."""
    recipe = recognise(pretrained)
    if recipe.sequences and not sequences:
        raise NotRecognised("its tokens interact, and anchors [n, d] have none")
    for k, layer in enumerate(finetuned):
        if recognise(layer) != recipe:
            raise NotRecognised(f"fine-tuned layer {k} has another structure than the pretrained")
    return recipe


def fall_back(engine: str, layer: nn.Module, reason: Exception) -> None:
    """Say why a layer runs on the autograd engine, or that engine "program" cannot run it."""
    name = type(layer).__name__
    if engine == "program":
        raise InputError(
            f"engine 'program' for {name}: {reason}",
            fix="Use engine='autograd', which takes any layer, or 'auto', which chooses",
        ) from reason
    _log.warning("%s runs on the autograd engine: %s", name, reason)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's parameters are."""
    return next(layer.parameters()).device


def dtype_of(layer: nn.Module) -> torch.dtype:
    """float64 layers get a float64 program, all others float32."""
    wide = any(p.dtype == torch.float64 for p in layer.parameters())
    return torch.float64 if wide else torch.float32


def check_options(engine: str, precision: str, distance: str) -> None:
    """Refuse an unknown engine, precision or distance."""
    if engine not in ENGINES:
        raise InputError("engine", expected=" | ".join(ENGINES), got=repr(engine))
    resolve(precision, "cpu")
    similarity.check_kind(distance)
