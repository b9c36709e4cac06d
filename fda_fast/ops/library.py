"""The operations as torch.library ops, for torch.compile alone.

A compiled function must not trace into a backend: addresses, streams and launches mean nothing to
the tracer. While it traces, ``dispatch.implementation`` therefore hands out the functions
here, which put one opaque op into the graph, ``torch.ops.fda_fast.<stem>_<function>``. At run time
that op calls whatever backend serves its tensors. Eager calls never come here: a registered op
costs some 25 microseconds a call.

Shapes of results come from the torch twins, run on the tracer's fake tensors. The ops have no
autograd: the engine that calls them runs without.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fda_fast.ops import dispatch

_TYPES = {
    "str": "str",
    "float": "float",
    "bool": "bool",
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
}

# Which outputs there are, from the arguments by name. An op cannot return None.
_OUTPUTS: dict[str, dict[str, Callable[[dict[str, Any]], tuple[bool, ...]]]] = {
    "activation": {
        "forward": lambda a: (True, a["dx"] is not None),
        "backward": lambda a: (True,),
        "tangent": lambda a: (True,),
        "reverse": lambda a: (True, a["need_b"]),
        "adjoint": lambda a: (True,),
    },
    "norm": {
        "forward": lambda a: (True, any(a[n] is not None for n in ("dx", "tw", "tb"))),
        "backward": lambda a: (a["need_input"], a["need_weight"], a["need_bias"]),
        "tangent": lambda a: (any(a[n] is not None for n in ("t", "mw", "mb")),),
        "reverse": lambda a: (True, a["need_b"]),
        "adjoint": lambda a: (a["need_input"], a["need_weight"], a["need_bias"]),
    },
    "similarity": {"forward": lambda a: (True, True), "reverse": lambda a: (True, True)},
}
_OUTPUTS["gated"] = _OUTPUTS["activation"]


def _fresh(out: Any) -> list[Tensor]:
    """The outputs that exist, as a list."""
    return [one for one in (out if isinstance(out, tuple) else (out,)) if one is not None]


def _register(stem: str, name: str) -> Callable[..., Any]:
    """Define torch.ops.fda_fast.<stem>_<name>; the function that calls it like a backend's."""
    twin = getattr(importlib.import_module(f"fda_fast.ops.reference.{stem}"), name)
    parameters = inspect.signature(twin).parameters
    names = tuple(parameters)
    schema = ", ".join(f"{_TYPES[p.annotation]} {n}" for n, p in parameters.items())
    first = next(i for i, p in enumerate(parameters.values()) if p.annotation == "Tensor")

    def run(*args: Any) -> list[Tensor]:
        module = dispatch.implementation(stem, args[first])
        return _fresh(getattr(module, name)(*args))

    op = torch.library.custom_op(
        f"fda_fast::{stem}_{name}", run, mutates_args=(), schema=f"({schema}) -> Tensor[]"
    )
    op.register_fake(lambda *args: _fresh(twin(*args)))
    exist = _OUTPUTS[stem][name]
    registered = getattr(torch.ops.fda_fast, f"{stem}_{name}").default

    def call(*args: Any) -> Any:
        present = exist(dict(zip(names, args, strict=True)))
        found = iter(registered(*args) if any(present) else ())
        out = tuple(next(found) if there else None for there in present)
        return out if len(out) > 1 else out[0]

    return call


def _register_adamw() -> Callable[..., None]:
    schema = (
        "(Tensor(a!) anchors, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor step, "
        "Tensor loss, Tensor(d!) best_loss, Tensor(e!) best_anchors, float lr, float beta1, "
        "float beta2, float eps, float weight_decay, Tensor(f!)? history) -> ()"
    )

    def run(anchors, grad, exp_avg, exp_avg_sq, step, loss, best_loss, best_anchors,
            lr, beta1, beta2, eps, weight_decay, history):  # fmt: skip
        dispatch.implementation("adamw", anchors).step_(
            anchors, grad, exp_avg, exp_avg_sq, step, loss, best_loss, best_anchors,
            lr, (beta1, beta2), eps, weight_decay, history,
        )  # fmt: skip

    mutated = ("anchors", "exp_avg", "exp_avg_sq", "best_loss", "best_anchors", "history")
    op = torch.library.custom_op("fda_fast::adamw_step_", run, mutates_args=mutated, schema=schema)
    op.register_fake(lambda *args: None)

    def call(anchors, grad, exp_avg, exp_avg_sq, step, loss, best_loss, best_anchors,
             lr, betas, eps, weight_decay, history=None):  # fmt: skip
        count = step if isinstance(step, Tensor) else torch.tensor(step, device=anchors.device)
        torch.ops.fda_fast.adamw_step_.default(
            anchors, grad, exp_avg, exp_avg_sq, count, loss, best_loss, best_anchors,
            lr, *betas, eps, weight_decay, history,
        )  # fmt: skip

    return call


TRACED: dict[str, SimpleNamespace] = {
    stem: SimpleNamespace(**{name: _register(stem, name) for name in functions})
    for stem, functions in _OUTPUTS.items()
}
TRACED["adamw"] = SimpleNamespace(step_=_register_adamw())
