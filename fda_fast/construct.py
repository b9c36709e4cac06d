"""Optimise the anchors of one layer so that their induced gradient points along the task vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fda_fast import layers
from fda_fast.errors import InputError
from fda_fast.layers.graph import AnchorOptimiser, step_runner


class NeverFinite(RuntimeError):
    """No step of a construction gave a finite loss."""


StepCallback = Callable[[int, Tensor, Tensor], None]
"""Called as ``(step, loss [K], cosines [K, P])`` with device tensors; reading one synchronises."""


@dataclass(frozen=True)
class Alignment:
    """The alignment of one set of anchors with one task vector.

    Attributes:
        loss: L(X) = sum over parameter tensors of 1 - cos(G_p, tau_p); in [0, 2P], no unit.
        grad: dL/dX, shape and dtype of the anchors.
        cosines: cos(G_p, tau_p) by parameter name, in the layer's own order.
    """

    loss: float
    grad: Tensor
    cosines: dict[str, float]

    @classmethod
    def of(
        cls, problem: layers.Problem, found: layers.Evaluation, names: Iterable[str] | None = None
    ) -> Alignment:
        """The evaluation of one task, of these parameters or of all; reads device tensors."""
        cosines = dict(zip(problem.parameter_names, found.cosines[0].tolist(), strict=True))
        kept = set(cosines if names is None else names)
        # What is left out is the constant 1 in the problem.
        loss = found.loss[0].item() - (len(cosines) - len(kept))
        return cls(loss, found.grad[0], {n: c for n, c in cosines.items() if n in kept})


@dataclass(frozen=True)
class Construction:
    """Anchors found for one layer and one or several experts.

    Attributes:
        anchors: the X with the lowest loss among those *evaluated*: [n, (T,) d] for one
            fine-tuned layer, [K, n, (T,) d] for a list of K.
        loss: its loss: a float, or K floats.
        history: loss at every step, [steps] or [steps, K], on the CPU.
        cosines: cos(G_p, tau_p) at the best X by parameter name: a dict, or K of them.
        steps: steps after which the anchors were taken: an int, or K of them.
    """

    anchors: Tensor
    loss: float | list[float]
    history: Tensor = field(repr=False)
    cosines: dict[str, float] | list[dict[str, float]]
    steps: int | list[int]


def alignment(
    pretrained_layer: nn.Module,
    finetuned_layer: nn.Module,
    anchors: Tensor,
    *,
    direction: Mapping[str, Tensor] | None = None,
    distance: str = "cosine",
    engine: str = "auto",
    precision: str = "auto",
) -> Alignment:
    """Alignment loss of anchors, its gradient and the cosine of every parameter tensor.

        s(X) = mean over anchors of sim(layer(theta_0, X), layer(theta_i, X))
        G_p  = ds/dtheta_0,p          L(X) = sum_p (1 - cos(G_p, theta_i,p - theta_0,p))

    Args:
        pretrained_layer: module with the weights theta_0, callable on ``anchors``.
        finetuned_layer: the same architecture with the weights theta_i.
        anchors: [n, d] vectors or [n, T, d] token sequences; float32 (or the layer's float64).
        direction: {parameter name: tensor} to align G_p with in place of the task vector; the
            loss then sums over its tensors alone. Runs on the autograd engine. For a direction
            and a loss of one layer there is the faster ``gradient_alignment``.
        distance: "cosine", "l2" or "l1": what compares the two outputs.
        engine: "auto", "program" (four sweeps) or "autograd" (double backward, any module).
        precision: "auto", "fp32", "tf32" or "bf16": operands of the program's matrix products.

    Returns:
        ``Alignment``.

    Raises:
        InputError: layers that differ in architecture, anchors of the wrong shape, unknown options.

    Cost: one construction step; about 25 products of the size of the layer's own (4 sweeps).
    Source: FDA, arXiv 2510.21223v1, Eq. 1, summed per tensor and with the sign of the similarity
    as in the published code.
    """
    problem: layers.Problem
    if direction is None:
        problem = layers.bind(
            pretrained_layer,
            [finetuned_layer],
            shape=tuple(anchors.shape),
            distance=distance,
            engine=engine,
            precision=precision,
        )
    else:
        problem = layers.bind_direction(
            pretrained_layer, finetuned_layer, direction, distance=distance, engine=engine
        )
    result = problem.evaluate(anchors.detach().unsqueeze(0))
    return Alignment.of(problem, result, direction)


def construct(
    pretrained_layer: nn.Module,
    finetuned_layer: nn.Module | Sequence[nn.Module],
    anchors: Tensor | Sequence[Tensor],
    *,
    steps: int = 1200,
    lr: float = 1e-2,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    distance: str = "cosine",
    engine: str = "auto",
    precision: str = "auto",
    patience: int | None = None,
    tolerance: float = 1e-4,
    part: int | None = None,
    progress: bool = True,
    on_step: StepCallback | None = None,
) -> Construction:
    """Optimise anchors with AdamW on the alignment loss; keep the best ones evaluated.

    Args:
        pretrained_layer: module with the weights theta_0.
        finetuned_layer: one fine-tuned layer, or K of them, optimised in one batch.
        anchors: where to start, from ``init_anchors``: [n, (T,) d] for one layer,
            [K, n, (T,) d] or K tensors for a list. Not modified.
        steps: AdamW steps. Default: the published 1200.
        lr: learning rate, published 1e-2, constant.
        weight_decay: decoupled decay of the anchors; published 0.01 (AdamW's default).
        betas: AdamW's moments; (0.9, 0.95) often needs fewer steps, and changes the result.
        eps: AdamW's epsilon.
        distance: "cosine" (published), "l2" or "l1".
        engine: "auto", "program" or "autograd".
        precision: "auto", "fp32", "tf32" or "bf16".
        patience: a task stops once its best loss improved by less than ``tolerance`` (relative)
            over this many steps, looked at every so many steps: the anchors it then has are kept,
            whatever the other tasks of the batch still do. None, the default, runs all steps as
            published.
        tolerance: see ``patience``.
        part: anchors of a task that a step holds at once. None, the default, holds all. The same
            result to rounding, from less memory: only the anchors themselves, their gradient and
            the optimiser's moments then grow with n. A step takes up to a third longer.
        progress: draw a progress bar on stderr (ignored when ``on_step`` is given).
        on_step: called after every evaluation with device tensors.

    Returns:
        ``Construction``; of a batch when ``finetuned_layer`` is a list.

    Raises:
        InputError: shapes or options that cannot be used.
        NeverFinite: the loss of a task was never finite; a RuntimeError.

    Cost: ``steps`` evaluations of ``alignment`` for each task; no host synchronisation inside
    the loop other than by ``patience``, ``progress`` and ``on_step``.
    Source: FDA, arXiv 2510.21223v1, Eq. 2 and Appendix C.3.
    """
    single = isinstance(finetuned_layer, nn.Module)
    finetuned = [finetuned_layer] if isinstance(finetuned_layer, nn.Module) else [*finetuned_layer]
    start = _stack(anchors, len(finetuned), single)
    _check_options(steps, patience)
    problem = layers.bind(
        pretrained_layer,
        finetuned,
        shape=tuple(start.shape[1:]),
        distance=distance,
        engine=engine,
        precision=precision,
        part=part,
    )
    names = problem.parameter_names
    optimiser = AnchorOptimiser(
        problem, start, steps=steps, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps
    )
    if on_step is None and progress:
        from fda_fast.progress import step_bar

        with step_bar(steps, n_terms=len(names)) as bar:
            found = _optimise(optimiser, steps, patience, tolerance, bar)
    else:
        found = _optimise(optimiser, steps, patience, tolerance, on_step)
    losses = [float(loss) for loss in found.loss.tolist()]
    for task, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NeverFinite(
                f"The alignment loss of task {task} was never finite in {found.steps[task]} steps."
                " Check the layer's weights for NaN or Inf, or start from smaller anchors."
            )
    cosines = [dict(zip(names, row, strict=True)) for row in found.cosines.tolist()]
    history = optimiser.history[: max(found.steps)].cpu()
    if single:
        return Construction(found.anchors[0], losses[0], history[:, 0], cosines[0], found.steps[0])
    return Construction(found.anchors, losses, history, cosines, found.steps)


@dataclass
class _Found:
    """The best anchors of every task, as they were when the task stopped."""

    anchors: Tensor
    loss: Tensor
    cosines: Tensor
    steps: list[int]


def _optimise(
    optimiser: AnchorOptimiser,
    steps: int,
    patience: int | None,
    tolerance: float,
    on_step: StepCallback | None,
) -> _Found:
    """Run the steps, at most ``steps``, fewer when every task has stopped."""
    run = step_runner(optimiser.step, optimiser.anchors.device)
    history = optimiser.history
    tasks = history.shape[1]
    stopped: dict[int, tuple[int, Tensor, Tensor, Tensor]] = {}
    done = 0
    while done < steps and len(stopped) < tasks:
        run()
        done += 1
        if on_step is not None:
            on_step(done, history[done - 1], optimiser.cosines)
        if patience and done % patience == 0 and done < steps:
            for task in _plateau(history[:done], patience, tolerance):
                if task not in stopped:
                    best = optimiser.best_anchors, optimiser.best_loss, optimiser.best_cosines
                    anchors, loss, cosines = (values[task].clone() for values in best)
                    stopped[task] = done, anchors, loss, cosines
    counts = [done] * tasks
    for task, (count, anchors, loss, cosines) in stopped.items():
        counts[task] = count
        optimiser.best_anchors[task] = anchors
        optimiser.best_loss[task] = loss
        optimiser.best_cosines[task] = cosines
    return _Found(optimiser.best_anchors, optimiser.best_loss, optimiser.best_cosines, counts)


def _plateau(history: Tensor, patience: int, tolerance: float) -> list[int]:
    """Tasks whose last ``patience`` steps improved by less than ``tolerance``: one host read."""
    if len(history) <= patience:
        return []
    before = history[:-patience].amin(0)
    now = history[-patience:].amin(0)
    flat: list[int] = (now > before * (1 - tolerance)).nonzero()[:, 0].tolist()
    return flat


def _stack(anchors: Tensor | Sequence[Tensor], n_tasks: int, single: bool) -> Tensor:
    if isinstance(anchors, Tensor):
        batch = anchors.detach()
        if single:
            batch = batch.unsqueeze(0)
    else:
        shapes = {tuple(x.shape) for x in anchors}
        if len(shapes) != 1:
            raise InputError(
                "anchors of the tasks", expected="one common shape", got=sorted(shapes)
            )
        batch = torch.stack([x.detach() for x in anchors])
    if batch.dim() not in (3, 4) or len(batch) != n_tasks:
        raise InputError(
            "anchors",
            expected=f"[n, d] or [n, T, d] for each of {n_tasks} fine-tuned layer(s)",
            got=list(batch.shape) if not single else list(batch.shape[1:]),
            fix="For a list of K layers pass [K, n, (T,) d] or K tensors.",
        )
    return batch


def _check_options(steps: int, patience: int | None) -> None:
    if steps < 1:
        raise InputError("steps", expected="at least 1", got=steps)
    if patience is not None and patience < 1:
        raise InputError("patience", expected="None or at least 1", got=patience)
