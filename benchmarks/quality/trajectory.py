"""Anchors on their way: the optimisation of ``fda_fast.construct``, kept at several steps.

One run of 1200 steps thus also gives the anchors of 10, 20, 40, ... steps: the step, the problem
and the optimiser are those of ``construct``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fda_fast import layers
from fda_fast.layers.evaluation import Evaluation
from fda_fast.layers.graph import AnchorOptimiser

KEPT = (1, 10, 20, 40, 100, 200, 400, 800, 1200, 1600)
"""Steps after which anchors are kept; 1 is the initialisation, the first to be evaluated."""


class OppositeSign:
    """An alignment problem with the sign of the paper's Eq. 1 as printed.

    There the gradient of the *distance* is aligned with the task vector, so every cosine of the
    published code changes its sign, and with it the gradient of the loss.
    """

    def __init__(self, problem: Any) -> None:
        self._problem = problem
        self.parameter_names = problem.parameter_names

    def evaluate(self, anchors: Tensor) -> Evaluation:
        found = self._problem.evaluate(anchors)
        loss = 2 * len(self.parameter_names) - found.loss
        return Evaluation(loss, -found.grad, -found.cosines)


def trajectory(
    pretrained: nn.Module,
    experts: Sequence[nn.Module],
    first: Tensor,
    *,
    steps: int,
    lr: float = 1e-2,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    sign: str = "code",
    **binding: Any,
) -> tuple[dict[int, Tensor], Tensor]:
    """The best anchors so far [K, n, T, d] after each of ``KEPT`` steps, and the losses [steps, K].

    Args:
        pretrained, experts, first: the layer, its fine-tuned versions, anchors to start from.
        steps, lr, weight_decay, betas: as in ``fda_fast.construct``.
        sign: "code", or "paper" for Eq. 1 as printed.
        binding: distance, engine, precision.
    """
    problem = layers.bind(pretrained, experts, shape=tuple(first.shape[1:]), **binding)
    if sign == "paper":
        problem = OppositeSign(problem)
    optimiser = AnchorOptimiser(
        problem, first, steps=steps, lr=lr, weight_decay=weight_decay, betas=tuple(betas)
    )
    kept = {}
    for step in range(1, steps + 1):
        optimiser.step()
        if step in KEPT or step == steps:
            kept[step] = optimiser.best_anchors.clone()
    return kept, optimiser.history
