"""Binding a layer, a direction and an objective to an engine: gradient matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fda_fast.errors import InputError
from fda_fast.layers import engine as engines
from fda_fast.layers.autograd import AutogradProblem, in_dtype
from fda_fast.layers.engine import Problem
from fda_fast.layers.objective import Objective, check_scalar
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision
from fda_fast.layers.problem import ProgramProblem
from fda_fast.layers.recognise import NotRecognised
from fda_fast.layers.verify import Mismatch, verify


def bind_objective(
    layer: nn.Module,
    towards: nn.Module,
    direction: Mapping[str, Tensor],
    objective: Callable[[Tensor], Tensor],
    *,
    shape: tuple[int, ...],
    engine: str = "auto",
    precision: str = "auto",
) -> Problem:
    """The problem of aligning a layer's gradient of an objective with a direction.

    Args:
        layer: at theta.
        towards: the layer moved along the direction, in float64: what a program takes for the
            fine-tuned side, so that its task vector is the direction.
        direction: {parameter name: tensor}.
        objective: scalar function of the output [n, (T,) d_out].
        shape: of the anchors, [n, (T,) d].
        engine, precision: as ``engine.bind``.

    Raises:
        InputError: as ``engine.bind``.
    """
    engines.check_options(engine, precision, "cosine")
    if engine != "autograd":
        try:
            recipe = engines.find_recipe(layer, [layer], len(shape) == 3)
            materials = Materials(
                layer,
                [towards],
                tokens=shape[1] if len(shape) == 3 else 1,
                precision=Precision(precision, engines.device_of(layer)),
                dtype=engines.dtype_of(layer),
            )
            root = recipe.build(materials)
            plain = ProgramProblem(root, materials)
            verify(plain, materials, layer, [towards], shape, "cosine")
            return ProgramProblem(root, materials, objective=Objective(objective, shape[:-1]))
        except (NotRecognised, Mismatch) as reason:
            engines.fall_back(engine, layer, reason)
    # The fine-tuned side is not run here, but its dtype would decide that of the layer.
    here = in_dtype(towards, engines.dtype_of(layer))
    return AutogradProblem(
        layer,
        [here],
        directions=[direction],
        objective=lambda y: check_scalar(objective(y)),
    )


def bind_direction(
    pretrained: nn.Module,
    finetuned: nn.Module,
    direction: Mapping[str, Tensor],
    *,
    distance: str = "cosine",
    engine: str = "auto",
) -> Problem:
    """The alignment problem of a pair of layers with another direction than its task vector.

    A program would need a third set of weights for it, so it runs on the autograd engine.

    Raises:
        InputError: as ``engine.bind`` and ``check_direction``; engine "program".
    """
    engines.check_options(engine, "fp32", distance)
    check_direction(pretrained, direction)
    if engine == "program":
        raise InputError(
            "engine 'program' with a direction",
            expected="'auto' or 'autograd'",
            fix="Programs align with the task vector; gradient_alignment() takes any direction",
        )
    return AutogradProblem(pretrained, [finetuned], distance=distance, directions=[direction])


def check_direction(layer: nn.Module, direction: Mapping[str, Tensor]) -> None:
    """Refuse a direction that does not fit a layer's parameters.

    Raises:
        InputError: an unknown name, another shape, NaN or infinity, or nothing at all.
    """
    parameters = dict(layer.named_parameters())
    if not direction:
        raise InputError("direction", expected="a tensor for at least one parameter", got="none")
    for name, tensor in direction.items():
        if name not in parameters:
            raise InputError(
                f"direction: {name!r} is no parameter of {type(layer).__name__}",
                expected=" | ".join(list(parameters)[:20]),
            )
        if tensor.shape != parameters[name].shape:
            raise InputError(
                f"direction of {name!r}",
                expected=list(parameters[name].shape),
                got=list(tensor.shape),
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"direction of {name!r}", expected="finite numbers", got="NaN or Inf")
