"""Sigma of a merge's Gaussian anchors where the configuration leaves it open."""

from __future__ import annotations

import dataclasses
import json

from fda_fast.job import Job
from fda_fast.layerwork import LayerInput, stable_seed
from fda_fast.pipeline import read_layer
from fda_fast.scale import STEPS, choose_scale
from fda_fast.work import WorkDirectory, write_atomically


def resolve_scale(job: Job, work: WorkDirectory) -> None:
    """Put a number in the place of ``scale: auto``, chosen on one layer; else do nothing.

    The layer is the middle one, or the first one behind it that some expert changes; all experts
    that change it count. The choice is kept in the work directory for a run that goes on, and in
    ``job.records["scale"]`` for the report.

    Args:
        job: the merge; its settings are replaced.
        work: the merge's work directory, open.

    Raises:
        InputError: NaN or Inf in the layer, by tensor name.
        RuntimeError: no sigma gave a finite loss.

    Cost: 600 construction steps of one layer for every expert, or six times the merge's own steps
    if they are fewer than 100.
    """
    wanted = job.settings.construct
    if not job.settings.optimises or wanted.init != "gaussian" or wanted.scale != "auto":
        return
    path = work.path / "scale.json"
    if path.exists():
        record = json.loads(path.read_text())
    else:
        inputs = _representative(job)
        moving = [layer for task, layer in inputs.finetuned.items() if task not in inputs.unchanged]
        found = choose_scale(
            inputs.pretrained,
            moving,
            wanted.shape(inputs.width),
            steps=min(STEPS, wanted.steps),
            lr=wanted.lr,
            weight_decay=wanted.weight_decay,
            betas=wanted.betas,
            eps=wanted.eps,
            distance=wanted.distance,
            engine=job.settings.engine,
            precision=job.settings.precision,
            layout=wanted.layout,
            seed=stable_seed(wanted.seed, inputs.name, "scale") % 2**31,
        )
        losses = {repr(scale): loss for scale, loss in found.losses.items()}
        record = {
            "chosen": found.scale,
            "layer": inputs.name,
            "steps": found.steps,
            "losses": losses,
        }
        write_atomically(path, json.dumps(record).encode())
    job.records["scale"] = record
    job.notes.append(f"scale {record['chosen']:g} was chosen on layer {record['layer']}")
    construct = dataclasses.replace(wanted, scale=record["chosen"])
    job.settings = dataclasses.replace(job.settings, construct=construct)


def _representative(job: Job) -> LayerInput:
    """The middle layer, or the first behind it, then before it, that some expert changes."""
    count = len(job.layers)
    for index in [*range(count // 2, count), *range(count // 2)]:
        inputs = read_layer(job, index)
        if len(inputs.unchanged) < len(job.experts):
            return inputs
    return inputs
