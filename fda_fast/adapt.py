"""Fit one merged layer to the anchors of all tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fda_fast import layers
from fda_fast.errors import InputError
from fda_fast.ops import coefficients

Weights = nn.Module | Mapping[str, Tensor]
Alpha = float | Mapping[str, float]
"""First value of the coefficients of a task vector: one, or one by parameter name."""
DEFAULT_LR = {"weights": 1e-5, "coefficients": 1e-2}
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Adaptation:
    """One adapted layer.

    Attributes:
        layer: a copy of the pretrained layer with the adapted weights.
        history: mean loss of an anchor in every epoch, [epochs], on the CPU.
        snapshots: the layer as it was after each epoch asked for.
    """

    layer: nn.Module = field(repr=False)
    history: Tensor = field(repr=False)
    snapshots: dict[int, nn.Module] = field(default_factory=dict, repr=False)


def adapt(
    layer: nn.Module,
    tasks: Sequence[tuple[Tensor, nn.Module]],
    *,
    mode: str = "weights",
    start: Weights | Sequence[tuple[Weights, Alpha]] | None = None,
    epochs: int = 100,
    lr: float | None = None,
    batch_size: int = 128,
    distance: str = "cosine",
    engine: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    order: Callable[[int], Tensor] | None = None,
    snapshots: Sequence[int] = (),
    part: int | None = None,
    on_epoch: Callable[[int, Tensor], None] | None = None,
) -> Adaptation:
    """Make one layer answer each task's anchors as that task's fine-tuned layer does.

        min over theta of  sum_i sum_j Dist(layer(theta, x_ij), layer(theta_i, x_ij))

    Args:
        layer: the pretrained layer theta_0. Not modified.
        tasks: (anchors [n, (T,) d], fine-tuned layer theta_i) of every task; all of one shape.
        mode: "weights" trains theta itself (Eq. 5). "coefficients" trains elementwise
            alpha_k of theta_0 + sum_k alpha_k * (theta_k - theta_0) (Eq. 6).
        start: where to begin. For "weights": a module or state dict, default ``layer``.
            For "coefficients": [(module or state dict theta_k, initial alpha_k), ...], default
            the tasks' fine-tuned layers at 0.3 (Task Arithmetic); a model merged by TSV-M or
            WUDI is one entry with alpha 1. An alpha may also be one number by parameter name.
        epochs: passes over all anchors, shuffled across tasks.
        lr: Adam's learning rate; default 1e-5 for "weights", 1e-2 for "coefficients".
        batch_size: anchors in a step.
        distance: "cosine" (minus the sum of cosines), "l2" or "l1" (summed), as published.
        engine: "auto", "program" or "autograd".
        precision: "auto", "fp32", "tf32" or "bf16".
        seed: of the shuffling.
        order: called with the epoch, from 1; gives the order of all anchors in it, int64 [N] on
            the CPU, counted task after task. Default: a permutation drawn with ``seed``.
        snapshots: epochs after which to keep a copy of the layer; each is, bit for bit, what a
            run of so many epochs gives.
        part: anchors that a step holds at once; None, the default, a whole batch. The same result
            to rounding, from less memory.
        on_epoch: called as ``(epoch, mean loss)`` with a device tensor.

    Returns:
        ``Adaptation``.

    Raises:
        InputError: unknown mode, empty tasks, shapes that differ, a start that does not fit.
        RuntimeError: the loss stopped being finite.

    Cost: epochs * ceil(total anchors / batch_size) first-order steps.
    Source: FDA, arXiv 2510.21223v1, Eq. 5 and 6; Adam without weight decay, last state kept.
    """
    _check(tasks, mode, epochs, batch_size)
    if any(not 1 <= epoch <= epochs for epoch in snapshots):
        raise InputError("snapshots", expected=f"epochs from 1 to {epochs}", got=list(snapshots))
    problem = layers.bind_adaptation(
        layer, list(tasks), distance=distance, engine=engine, precision=precision, part=part
    )
    rate = DEFAULT_LR[mode] if lr is None else lr
    if mode == "weights":
        step = _weights_stepper(problem, layer, start, rate)
    else:
        step = _coefficients_stepper(problem, layer, tasks, start, rate)
    kept: dict[int, nn.Module] = {}

    def after_epoch(epoch: int, loss: Tensor) -> None:
        if epoch in snapshots:
            kept[epoch] = _with_deltas(layer, problem.deltas)
        if on_epoch is not None:
            on_epoch(epoch, loss)

    shuffle = _shuffling(problem.size, seed) if order is None else order
    history = _train(problem, step, epochs, batch_size, shuffle, after_epoch)
    if not torch.isfinite(history).all():
        epoch = int((~torch.isfinite(history)).nonzero()[0])
        raise RuntimeError(
            f"The adaptation loss is not finite from epoch {epoch + 1} on; lower lr (now {rate:g})."
        )
    return Adaptation(_with_deltas(layer, problem.deltas), history, kept)


def _shuffling(size: int, seed: int) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda epoch: torch.randperm(size, generator=generator)


def _train(
    problem: layers.AdaptationProblem,
    step: Callable[[int], None],
    epochs: int,
    batch_size: int,
    order: Callable[[int], Tensor],
    on_epoch: Callable[[int, Tensor], None],
) -> Tensor:
    done = 0
    history = []
    for epoch in range(1, epochs + 1):
        total: Tensor | None = None
        for index in order(epoch).split(batch_size):
            loss = problem.evaluate(index)
            done += 1
            step(done)
            problem.refresh()
            total = loss if total is None else total + loss
        assert total is not None
        history.append(total / problem.size)
        on_epoch(epoch, history[-1])
    return torch.stack(history).cpu()


def _weights_stepper(
    problem: layers.AdaptationProblem,
    layer: nn.Module,
    start: Weights | Sequence[tuple[Weights, Alpha]] | None,
    lr: float,
) -> Callable[[int], None]:
    """Adam on theta = theta_0 + delta; training delta keeps small changes in full precision."""
    if start is not None:
        if not isinstance(start, nn.Module | Mapping):
            raise InputError(
                "start", expected='one module or state dict with mode="weights"', got=type(start)
            )
        for name, delta in _differences(layer, start):
            problem.deltas[name].copy_(delta)
        problem.refresh()
    names = list(problem.deltas)
    parameters = [problem.deltas[name] for name in names]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=BETAS, eps=EPS)

    def step(_: int) -> None:
        for name, parameter in zip(names, parameters, strict=True):
            parameter.grad = problem.gradients[name]
        optimizer.step()

    return step


def _coefficients_stepper(
    problem: layers.AdaptationProblem,
    layer: nn.Module,
    tasks: Sequence[tuple[Tensor, nn.Module]],
    start: Weights | Sequence[tuple[Weights, Alpha]] | None,
    lr: float,
) -> Callable[[int], None]:
    """Adam on elementwise alpha_k of theta_0 + sum_k alpha_k tau_k."""
    if start is None:
        start = [(finetuned, 0.3) for _, finetuned in tasks]
    if isinstance(start, nn.Module | Mapping) or not start:
        raise InputError(
            "start",
            expected='a list of (module or state dict, alpha) with mode="coefficients"',
            got=type(start).__name__,
        )
    alphas = [alpha for _, alpha in start]
    state: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    # One parameter after the other: the task vectors of a whole layer are there once, not twice.
    for found in zip(*(_differences(layer, weights) for weights, _ in start), strict=True):
        name = found[0][0]
        delta = problem.deltas[name]
        tau = torch.stack([difference for _, difference in found]).to(delta)
        if not tau.any():
            continue  # no alpha has a gradient here: the tensor stays pretrained
        scales = [alpha if isinstance(alpha, int | float) else alpha[name] for alpha in alphas]
        shape = (len(scales), *[1] * delta.dim())
        alpha = tau.new_tensor(scales).view(shape).expand_as(tau).contiguous()
        delta.copy_((alpha * tau).sum(0))
        state[name] = (alpha, tau, torch.zeros_like(delta), torch.zeros_like(delta))
    problem.refresh()

    def step(count: int) -> None:
        for name, (alpha, tau, exp_avg, exp_avg_sq) in state.items():
            coefficients.update_(
                alpha,
                tau,
                problem.gradients[name],
                exp_avg,
                exp_avg_sq,
                problem.deltas[name],
                count,
                lr=lr,
                betas=BETAS,
                eps=EPS,
            )

    return step


def _differences(layer: nn.Module, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """(name, theta - theta_0) of every parameter of ``layer``, in its dtype."""
    if isinstance(weights, nn.Module):
        weights = dict(weights.named_parameters())
    for name, pretrained in layer.named_parameters():
        if name not in weights:
            raise InputError(
                f"start: tensor {name}", expected=list(pretrained.shape), got="missing"
            )
        tensor = weights[name].detach()
        if tensor.shape != pretrained.shape:
            raise InputError(
                f"start: tensor {name}", expected=list(pretrained.shape), got=list(tensor.shape)
            )
        yield name, tensor.to(pretrained) - pretrained.detach()


def _with_deltas(layer: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    adapted = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(deltas[name].to(parameter))
    return adapted


def _check(
    tasks: Sequence[tuple[Tensor, nn.Module]], mode: str, epochs: int, batch_size: int
) -> None:
    if mode not in DEFAULT_LR:
        raise InputError("mode", expected=" or ".join(map(repr, DEFAULT_LR)), got=repr(mode))
    if not tasks:
        raise InputError("tasks", expected="at least one (anchors, fine-tuned layer)", got="none")
    shapes = {tuple(anchors.shape[1:]) for anchors, _ in tasks}
    if len(shapes) != 1:
        raise InputError("anchors", expected="one shape behind n for all tasks", got=shapes)
    if epochs < 1 or batch_size < 1:
        raise InputError(
            "epochs and batch_size", expected="at least 1", got=f"{epochs}, {batch_size}"
        )
