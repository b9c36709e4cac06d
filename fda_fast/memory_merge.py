"""merge() of models at hand: modules or state dicts in, a module or state dict out."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
import transformers
from torch import Tensor, nn

from fda_fast.activations import check_extra_anchors
from fda_fast.budget import Limits, choose_limits
from fda_fast.checkpoints.align import ExpertView, check_finite, match_expert
from fda_fast.checkpoints.identity import check_differs
from fda_fast.checkpoints.memory import (
    MemoryCheckpoint,
    ModuleNames,
    base_checkpoint,
    expert_checkpoint,
    module_layout,
    unwrapped,
)
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.skeleton import build_skeleton
from fda_fast.config import MergeConfig, parse
from fda_fast.errors import InputError
from fda_fast.job import Job, assemble, choose_device
from fda_fast.layers.call import call_layer
from fda_fast.layerwork import LayerResult
from fda_fast.pipeline import process_layer
from fda_fast.progress import Display, display
from fda_fast.references import locate
from fda_fast.reuse import reuse_notes
from fda_fast.settings import requested_scope, task_names
from fda_fast.startpoint import merged_tensor
from fda_fast.startscale import resolve_scale
from fda_fast.work import WorkDirectory, file_name

Weights = nn.Module | Mapping[str, Tensor]
Expert = Weights | str | os.PathLike[str]


@dataclass(frozen=True)
class Merged:
    """A model merged in memory, and what the merge did.

    Attributes:
        model: a module if one was given, else a state dict.
        layers: results per layer: losses and cosines by task, adaptation loss, times.
        seconds: time by phase: read, construct, start, adapt, total.
        notes: what the user should know.
        settings: every setting, after presets.
    """

    model: nn.Module | dict[str, Tensor]
    layers: list[LayerResult]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)


def merge_in_memory(
    pretrained: Weights,
    experts: Sequence[Expert] | Mapping[str, Expert],
    *,
    model: nn.Module | transformers.PretrainedConfig | None = None,
    start: str = "pretrained",
    method: str = "fda",
    dtype: str | None = None,
    device: str = "auto",
    anchors_from: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **parameters: Any,
) -> Merged:
    """Merge fine-tuned models at hand; nothing that is passed in is modified.

    The same layers, settings and random numbers as ``merge`` on disk, so the same weights. The
    names of the experts seed their anchors: give the same names for the same numbers.

    Args:
        pretrained: the base: an ``nn.Module`` (transformers, open_clip, timm, or any with its
            layers in a list), or a state dict.
        experts: fine-tuned models: modules (other heads are ignored), PEFT models (merged
            without touching them), state dicts, or paths as ``merge`` takes; a mapping names
            them. Default names: the folder that ``from_pretrained`` read, else "expert-1", ...
        model: for a state dict, the module it belongs to (its tensors may be on the meta device)
            or its transformers config.
        start, method, dtype, device, progress: as ``merge``; dtype None keeps the base's, tensor
            by tensor.
        anchors_from: folder of finished anchors.
        **parameters: as ``merge``.

    Returns:
        ``Merged``: a copy of the base's module in its own mode and on its device, or a dict.

    Raises:
        InputError: as ``merge``; layers that do not run on one tensor of tokens.

    Memory: the result, one layer of all models in float32 and its anchors.
    """
    begun = time.monotonic()
    structure = _structure(pretrained, model)
    if isinstance(pretrained, nn.Module):
        pretrained = unwrapped(pretrained)
    names = _names(pretrained, experts)
    listed = list(experts.values()) if isinstance(experts, Mapping) else list(experts)
    content: dict[str, Any] = {
        "merge_method": method,
        "base_model": "the pretrained model",
        "models": [{"model": f"expert {name}", "name": name} for name in names],
        "parameters": parameters if method != "fda" else {"start": start, **parameters},
        "out_dtype": dtype,
    }
    base = base_checkpoint(pretrained, structure)
    job = _prepare(parse(content, where="merge()"), base, listed, structure, device)
    for view in job.experts.values():
        check_differs(view, job.layout)
    result = _Result(pretrained, job)
    layers: list[LayerResult] = []
    with ExitStack() as stack:
        shown = stack.enter_context(display(progress))
        for note in job.notes:
            shown.note(note)
        if job.settings.optimises:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fda-")))
            source = None if anchors_from is None else Path(anchors_from)
            if source is not None:
                job.notes += reuse_notes(job, source)
            layers = _layers(job, result, scratch, shown, source)
        _rest(job, result)
    seconds: dict[str, float] = {}
    for layer in layers:
        for phase, spent in layer.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    seconds.pop("save", None)
    seconds["total"] = time.monotonic() - begun
    return Merged(result.finish(), layers, seconds, job.notes, job.settings.as_dict())


class _Result:
    """The merged model being filled in: a copy of the base."""

    def __init__(self, pretrained: Weights, job: Job) -> None:
        dtype: torch.dtype | None = None
        if job.settings.dtype is not None:
            dtype = getattr(torch, job.settings.dtype)
        self._tied = job.layout.tied
        self._module: nn.Module | None = None
        if isinstance(pretrained, nn.Module):
            self._module = copy.deepcopy(pretrained)
            if dtype is not None:
                self._module.to(dtype)
            self._tensors = dict(self._module.state_dict())
        else:
            self._tensors = {
                name: tensor.detach().to(
                    dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype,
                    copy=True,
                )
                for name, tensor in pretrained.items()
            }

    @torch.no_grad()
    def put(self, name: str, tensor: Tensor) -> None:
        """Take over one merged tensor."""
        target = self._tensors[name]
        target.copy_(tensor)
        if target.is_floating_point() and not bool(torch.isfinite(target).all()):
            raise InputError(
                f"merged tensor {name!r} is not finite in {str(target.dtype)[6:]}",
                got=f"values up to {tensor.abs().max().item():g}",
                fix="Ask for a wider dtype: float32, or bfloat16 in place of float16",
            )

    @torch.no_grad()
    def finish(self) -> nn.Module | dict[str, Tensor]:
        """The model; a tensor that the base ties to another and stores twice equals it again."""
        for name, source in self._tied.items():
            if self._tensors[name].data_ptr() != self._tensors[source].data_ptr():
                self._tensors[name].copy_(self._tensors[source])
        return self._tensors if self._module is None else self._module


class _Scratch(WorkDirectory):
    """Where the layers of a merge in memory go: anchors to a temporary folder, weights on."""

    def __init__(self, folder: Path, result: _Result, limits: Limits) -> None:
        super().__init__(folder / "merge")
        self.batch, self.part = limits.batch, limits.part
        self._result = result

    def is_finished(self, layer: str) -> bool:
        return False

    def save_layer(
        self, layer: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> None:
        for name, tensor in tensors.items():
            self._result.put(name, tensor)
        for path in self.path.glob(f"anchors/*/{file_name(layer)}.safetensors"):
            path.unlink()

    def save_times(self, layer: str, seconds: Mapping[str, float]) -> None:
        """Nothing: the merge's report has them."""


def _structure(
    pretrained: Weights, model: nn.Module | transformers.PretrainedConfig | None
) -> nn.Module:
    """The module whose layers are merged; for a config one on the meta device."""
    if isinstance(pretrained, nn.Module):
        if model is not None:
            raise InputError("model", expected="none: the pretrained model is a module itself")
        return unwrapped(pretrained)
    if isinstance(model, nn.Module):
        return unwrapped(model)
    if model is None:
        raise InputError(
            "model",
            expected="with state dicts, the module or transformers config that they belong to",
            got="none",
            fix="Names alone do not tell the layers; a module on the meta device will do",
        )
    content = model.to_dict()
    described = MemoryCheckpoint(pretrained, "base model", source="state dict", config=content)
    return build_skeleton(described)


def _names(pretrained: Weights, experts: Sequence[Expert] | Mapping[str, Expert]) -> list[str]:
    """Names of the experts, made as those of folders are where they were read from one."""
    if isinstance(experts, Mapping):
        return list(experts)
    if isinstance(experts, nn.Module | str | os.PathLike):
        raise InputError(
            "experts", expected="a list or mapping of models", got=type(experts).__name__
        )
    origin = getattr(pretrained, "name_or_path", "")
    references = []
    for number, expert in enumerate(experts, 1):
        if isinstance(expert, str | os.PathLike):
            references.append(os.fspath(expert))
            continue
        path = getattr(unwrapped(expert), "name_or_path", "") if _is_module(expert) else ""
        known = isinstance(path, str) and path and path != origin
        references.append(path if known else f"expert-{number}")
    return task_names(references, [None] * len(references))


def _is_module(expert: Expert) -> TypeGuard[nn.Module]:
    return isinstance(expert, nn.Module)


def _prepare(
    config: MergeConfig,
    base: Checkpoint,
    experts: Sequence[Expert],
    structure: nn.Module,
    device: str,
) -> Job:
    where = choose_device(device)
    names = ModuleNames(structure)
    layout = module_layout(base, structure, names, requested_scope(config.parameters))
    views: dict[str, ExpertView] = {}
    for entry, expert in zip(config.models, experts, strict=True):
        name = str(entry.name)
        role = f"expert {name}"
        if isinstance(expert, str | os.PathLike):
            opened = Checkpoint.open(locate(os.fspath(expert), role), role=role)
        else:
            opened = expert_checkpoint(expert, base, names, role)
        views[name] = match_expert(base, opened, layout)
    job = assemble(config, base, views, layout, where)
    if job.settings.adapt.snapshots:
        raise InputError(
            "epochs", expected="one number in memory", got=list(job.settings.adapt.snapshots)
        )
    if job.extra_anchors is not None:
        check_extra_anchors(job.extra_anchors, job.experts, [s.name for s in job.layers])
    if job.settings.optimises:
        _check_layers_run(job)
    return job


def _check_layers_run(job: Job) -> None:
    """Run one layer of every class once: nothing is known of how a plain module calls them."""
    for spec in {spec.kind: spec for spec in reversed(job.layers)}.values():
        stored = job.base.read(spec.tensors.values())
        layer = job.layout.build(spec, {n: stored[name] for n, name in spec.tensors.items()})
        shape = (2, *job.settings.construct.shape(spec.width)[1:])
        try:
            with torch.no_grad():
                found = call_layer(layer, torch.zeros(shape))
            problem = "" if found.shape[:-1] == shape[:-1] else f"output {list(found.shape)}"
        except Exception as error:  # whatever a layer makes of an input that it was not made for
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        if problem:
            raise InputError(
                f"layer {spec.name} ({spec.kind}) does not map one tensor of tokens to another",
                expected=f"a layer for anchors {list(shape)}",
                got=problem,
                fix="FDA merges blocks that take [n, T, width] and MLPs that take [n, width]",
            )


def _layers(
    job: Job, result: _Result, scratch: Path, shown: Display, anchors: Path | None
) -> list[LayerResult]:
    work = _Scratch(scratch, result, choose_limits(job))
    work.path.mkdir()
    resolve_scale(job, work)
    shown.start(len(job.layers), 0)
    results = []
    for index in range(len(job.layers)):
        results.append(process_layer(job, work, index, shown, source=anchors))
    return results


def _rest(job: Job, result: _Result) -> None:
    """The tensors that no layer gave: merged by the starting point, or the base's own."""
    settings = job.settings
    layered = {n for spec in job.layers for n in spec.parameters.values()}
    done = layered if settings.optimises else set()
    merged = settings.outside == "start" and settings.start != "pretrained"
    for name in job.base.names:
        if name in job.layout.tied or name in done:
            continue
        if merged or name in layered:
            result.put(name, merged_tensor(job, name))
        else:
            tensor = job.base.read([name])[name]
            check_finite(name, tensor, job.base.role)
            result.put(name, tensor)
