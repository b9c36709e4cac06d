"""The features of merged model and experts on texts: representation bias, and activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.report.representation import hidden_states, representation_bias
from fda_fast.report.results import Analyses
from fda_fast.report.run import Run

if TYPE_CHECKING:
    from fda_fast.job import Job


def read_features(
    run: Run, job: Job, texts: Mapping[str, Path], result: Analyses, *, collect: bool
) -> dict[str, dict[str, Tensor]]:
    """The experts' activations on texts; fills in the representation bias.

    Args:
        run: the merge.
        job: its checkpoints.
        texts: files by task.
        result: gets the bias.
        collect: keep the activations.

    Returns:
        {task: {layer: [n, (T,) d]}}, empty without ``collect``.

    Raises:
        InputError: a base model without a folder or tokenizer, texts that cannot be read.
    """
    from fda_fast.activations import collect_activations
    from fda_fast.report import texts as reading
    from fda_fast.startpoint import merged_tensor

    if job.base.directory is None:
        raise InputError("texts", expected="a base model in a Hugging Face folder")
    tokenizer = reading.load_tokenizer(run.folder, job.base.directory)
    inputs = {
        task: reading.batches(reading.read_texts(path), tokenizer) for task, path in texts.items()
    }
    model = reading.load_model(job.base.directory)
    names = [layer.layer for layer in run.layers]
    modules = dict(model.named_modules())
    paths = {n: n for n in names if n in modules}
    result.bias_layers = list(paths)
    models = {"pretrained": {}, "merged": _tensors(run, job)}
    layered = [name for spec in job.layers for name in spec.parameters.values()]
    if job.settings.start != "pretrained":
        models["start"] = {name: merged_tensor(job, name) for name in layered}
    features = {}
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for label, tensors in models.items():
        _reset(model, base)
        reading.put(model, job, tensors)
        features[label] = {
            task: hidden_states(model, found, paths) for task, found in inputs.items()
        }
    real = {}
    for task, found in inputs.items():
        _reset(model, base)
        reading.put_expert(model, job, task)
        theirs = hidden_states(model, found, paths)
        if collect:
            real[task] = collect_activations(
                model, found, layers=names, scope=job.settings.scope, count=1 << 30
            )
        for label, by_task in features.items():
            rows = [representation_bias(by_task[task][name], theirs[name]) for name in paths]
            result.bias.setdefault(label, {})[task] = rows
    return real


def _tensors(run: Run, job: Job) -> dict[str, Tensor]:
    """Every tensor of the merged model under the base's names."""
    from fda_fast.checkpoints.reader import Checkpoint

    merged = Checkpoint.open(run.folder, role="merged model")
    try:
        return merged.read([name for name in job.base.names if name in merged.names])
    finally:
        merged.close()


@torch.no_grad()
def _reset(model: torch.nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
