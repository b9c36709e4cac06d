"""Layers as four-sweep programs, and the autograd engine."""

from fda_fast.layers.engine import AdaptationProblem, Problem, bind, bind_adaptation
from fda_fast.layers.evaluation import Evaluation
from fda_fast.layers.matching import bind_direction, bind_objective

__all__ = [
    "AdaptationProblem",
    "Evaluation",
    "Problem",
    "bind",
    "bind_adaptation",
    "bind_direction",
    "bind_objective",
]
