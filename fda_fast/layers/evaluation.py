"""What one evaluation of the alignment loss gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fda_fast.errors import InputError


@dataclass(frozen=True)
class Evaluation:
    """Alignment of K tasks of one layer at given anchors; device tensors, nothing synchronised.

    Attributes:
        loss: [K], sum over the P parameter tensors of 1 - cos, in [0, 2P].
        grad: d loss_k / d anchors_k, shaped and typed like the anchors [K, n, (T,) d].
        cosines: [K, P], cos(gradient of the similarity, task vector), in the order of the
            problem's ``parameter_names``; 0 where the term of L is the constant 1.
    """

    loss: Tensor
    grad: Tensor
    cosines: Tensor


def check_part(part: int | None, objective: object = None) -> None:
    """Refuse a number of anchors that cannot be a part.

    Raises:
        InputError: below one, or given with an objective.
    """
    if part is not None and (part < 1 or objective is not None):
        raise InputError(
            "part", expected="at least 1 anchor, and a similarity, not an objective", got=part
        )
