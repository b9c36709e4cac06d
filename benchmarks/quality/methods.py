"""The merging methods, each from a suite to the weights of its layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import stored
import torch
from regmean import regmean
from suite import LayerWeights, Suite
from torch import Tensor, nn
from trajectory import trajectory

import fda_fast
from fda_fast.starting import Method, merge_tensor

_INIT = ("init", "anchors", "tokens", "scale")


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters()}


def starting_point(suite: Suite, method: Method, **settings: Any) -> LayerWeights:
    """Task Arithmetic, TSV-M or WUDI of every layer at scaling 1.

    ``settings``: of ``starting.merge_tensor``.
    """
    merged = []
    for index, layer in enumerate(suite.layers(suite.pretrained)):
        experts = [parameters(expert) for expert in suite.experts_at(index)]
        merged.append(
            {
                name: merge_tensor(
                    method, name, p, [e[name] - p for e in experts], scaling=1.0, **settings
                )
                for name, p in parameters(layer).items()
            }
        )
    return merged


def scaled(suite: Suite, layers: LayerWeights, scaling: float) -> LayerWeights:
    """The pretrained layers plus ``scaling`` times what a merge added to them."""
    return [
        {name: p + scaling * (merged[name] - p) for name, p in parameters(layer).items()}
        for layer, merged in zip(suite.layers(suite.pretrained), layers, strict=True)
    ]


def settings_of(suite: Suite, seed: int = 0, **changed: Any) -> dict[str, Any]:
    """All settings of construction: the suite's with changes, and the seed."""
    return {
        "init": "weights",
        "anchors": suite.anchors,
        "tokens": suite.tokens,
        "steps": suite.steps,
        **changed,
        "seed": seed,
    }


def construct(
    suite: Suite, seed: int, *, at: int | None = None, **changed: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """Anchors [K, n, T, d] of every layer, stored; and their record.

    Args:
        suite: whose layers and experts.
        seed: of the initialisation.
        at: the anchors after this many steps, one of ``trajectory.KEPT``; default: all.
        changed: changes to the suite's settings; "init", "anchors", "tokens" and "scale" are of
            ``init_anchors``, the rest of ``trajectory`` (of ``fda_fast.construct`` with
            "patience").

    Returns:
        (anchors, record): "seconds" of the processor over all layers; "loss", the mean of
        1 - cosine over all tensors of all layers and tasks; "steps" done, mean over layers.
    """
    settings = settings_of(suite, seed, **changed)
    at = at or settings["steps"]
    anchors, records = [], []
    for index in range(suite.depth):
        found, record = stored.tensors(
            stored.folder(suite.name) / "anchors",
            f"{settings['init']}-{index}",
            {**settings, "layer": index, "suite": fingerprint(suite)},
            lambda index=index: _construct_layer(suite, index, settings),
        )
        anchors.append(found[str(at)])
        records.append(record)
    share = at / settings["steps"]
    return anchors, {
        "seconds": round(share * sum(record["seconds"] for record in records), 2),
        "loss": sum(record["loss"][str(at)] for record in records) / len(records),
        "steps": sum(record.get("steps", at) for record in records) / len(records),
    }


def _construct_layer(
    suite: Suite, index: int, settings: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    pretrained = suite.layers(suite.pretrained)[index]
    experts = suite.experts_at(index)
    first = first_anchors(experts, index, settings)
    options = {k: v for k, v in settings.items() if k not in (*_INIT, "seed")}
    begun = time.process_time()
    notes: dict[str, Any] = {}
    if "patience" in options:  # the library's own stopping rule
        found = fda_fast.construct(pretrained, experts, first, progress=False, **options)
        kept, history = {settings["steps"]: found.anchors}, found.history
        notes["steps"] = len(history)
    else:
        kept, history = trajectory(pretrained, experts, first, **options)
    seconds = round(time.process_time() - begun, 2)
    tensors = len(list(pretrained.parameters()))
    history = torch.where(history.isnan(), torch.inf, history)
    loss = {str(s): history[:s].amin(0).mean().item() / tensors for s in kept}
    print(f"anchors of layer {index} {settings}: loss {loss}, {seconds} s", flush=True)
    return {str(s): x for s, x in kept.items()}, {"seconds": seconds, "loss": loss, **notes}


def first_anchors(experts: Sequence[nn.Module], index: int, settings: dict[str, Any]) -> Tensor:
    """[K, n, T, d], one random stream a layer, task after task."""
    generator = torch.Generator().manual_seed(1000 * settings["seed"] + index)
    width = next(p for p in experts[0].parameters() if p.ndim == 2).shape[1]
    shape = (settings["anchors"], settings["tokens"], width)
    return torch.stack(
        [
            fda_fast.init_anchors(
                expert,
                shape,
                settings["init"],
                scale=settings.get("scale", 0.01),
                generator=generator,
            )
            for expert in experts
        ]
    )


def fingerprint(suite: Suite) -> str:
    """Changes with any trained weight of the suite."""
    records = [suite.record["pretrained"], *suite.record["experts"].values()]
    return stored.key_of({"files": [record["sha256"] for record in records]})


def adapt(
    suite: Suite,
    anchors: Sequence[Sequence[Tensor] | Tensor],
    start: LayerWeights | None = None,
    coefficient: float | None = None,
    **settings: Any,
) -> LayerWeights:
    """Every layer fitted to all tasks' anchors.

    Args:
        suite: whose layers and experts.
        anchors: of every layer, of every task.
        start: a merged model's layers, refined as one task vector (TSV-M, WUDI); or None.
        coefficient: without ``start``: first factor of every expert's task vector (Task
            Arithmetic); None: all weights are free, from the pretrained layer.
        settings: of ``fda_fast.adapt``.
    """
    if start is None and coefficient is None:
        settings["mode"] = "weights"
    else:
        settings["mode"] = "coefficients"
    merged = []
    for index, layer in enumerate(suite.layers(suite.pretrained)):
        experts = suite.experts_at(index)
        if start is not None:
            settings["start"] = [(start[index], 1.0)]
        elif coefficient is not None:
            settings["start"] = [(expert, coefficient) for expert in experts]
        tasks = list(zip(anchors[index], experts, strict=True))
        merged.append(parameters(fda_fast.adapt(layer, tasks, **settings).layer))
    return merged


def regmean_of(
    suite: Suite, inputs: Sequence[Sequence[Tensor] | Tensor], off_diagonal: float
) -> LayerWeights:
    """RegMean of every layer, on anchors or real inputs."""
    return [
        regmean(suite.experts_at(index), list(inputs[index]), off_diagonal=off_diagonal)
        for index in range(suite.depth)
    ]


def real_inputs(suite: Suite, count: int) -> list[list[Tensor]]:
    """What the experts' layers really see: [layer][task] [count, tokens, d]. Uses data."""
    return [
        [suite.real_inputs(task, index, count) for task in suite.tasks]
        for index in range(suite.depth)
    ]
