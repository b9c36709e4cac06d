"""The layers of a base model: which tensors they own, and building one of them from tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from fda_fast.checkpoints.mixture import Expert, find_experts
from fda_fast.checkpoints.names import Names
from fda_fast.checkpoints.openclip import image_encoder, is_image_encoder
from fda_fast.checkpoints.places import Scope, layer_paths
from fda_fast.checkpoints.reader import SHOWN, Checkpoint, some
from fda_fast.checkpoints.repeated import (
    input_width,
    repeated_layers,
)
from fda_fast.checkpoints.skeleton import (
    build_skeleton,
    constructor_arguments,
    is_decoder,
    quiet,
)
from fda_fast.errors import InputError


@dataclass(frozen=True)
class LayerSpec:
    """One layer that anchors are made for.

    Attributes:
        name: its path in the model, without the base model's prefix: "encoder.layer.3",
            "layers.7.mlp".
        scope: "block" or "mlp".
        kind: the class of the module: "BertLayer", "LlamaMLP".
        parameters: {name in the layer: name in the base checkpoint}, in the order of
            ``named_parameters()``.
        buffers: the same for buffers that checkpoints hold; rarely any.
        shapes: {name in the layer: shape} of the parameters.
        numel: number of parameters.
        width: d, the size of the vectors the layer takes.
    """

    name: str
    scope: str
    kind: str
    parameters: dict[str, str]
    buffers: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    numel: int
    width: int

    @property
    def tensors(self) -> dict[str, str]:
        """Parameters and buffers: all that ``ModelLayout.build`` needs for this layer."""
        return self.parameters | self.buffers


@dataclass(frozen=True)
class ModelLayout:
    """Where the layers of a base model are. Use ``ModelLayout.from_checkpoint``.

    Attributes:
        base: the checkpoint.
        model: its skeleton on the meta device.
        layers: the layers, in the order of the model.
        outside: names in the base of every tensor that belongs to no layer's parameters.
        names: maps checkpoint names to canonical ones.
        base_table: {canonical name: name in the base}.
        tied: {tensor in the base: the tensor in the base it is tied to and equal to}: need not
            be written.
        decoder: whether the model is a causal language model.
        notes: what was found and accepted.
    """

    base: Checkpoint
    model: transformers.PreTrainedModel = field(repr=False)
    layers: list[LayerSpec]
    outside: list[str]
    names: Names = field(repr=False)
    base_table: dict[str, str] = field(repr=False)
    tied: dict[str, str]
    decoder: bool
    notes: list[str]
    _modules: dict[str, nn.Module] = field(repr=False, default_factory=dict)
    _buffers: dict[str, dict[str, torch.Tensor]] = field(repr=False, default_factory=dict)
    _arguments: dict[type, dict[str, Any]] = field(repr=False, default_factory=dict)

    @classmethod
    def from_checkpoint(cls, base: Checkpoint, scope: Scope = "auto") -> ModelLayout:
        """Find the layers of a checkpoint and its tensors in them.

        Args:
            base: the base model: a Hugging Face directory with config.json, or a pickled
                open_clip image encoder, of which the image blocks are the layers.
            scope: "block" (each whole layer), "mlp" (the MLP of each layer), or "auto": the MLP
                for causal language models, as published, and whole layers otherwise.

        Raises:
            InputError: no config.json, an unknown model type, config.json and weights that
                disagree, experts or other tensors that are fused into one, no
                layers found.

        Cost: 0.1 to 1 s; reads no weights, except tied tensors that are stored twice.
        """
        if base.adapter is not None:
            raise InputError(
                f"the {base.role} {base.path} is an adapter",
                expected="a full model",
                fix="Give the model it was trained on as the base model and this as an expert",
            )
        if base.config is None and is_image_encoder(base):
            # A pickled module stands in for config.json. In-memory models build on layouts.
            from fda_fast.checkpoints.memory import ModuleNames

            encoder: Any = image_encoder(base)
            return cls.from_model(base, encoder, ModuleNames(encoder), scope, decoder=False)
        model = build_skeleton(base)
        return cls.from_model(base, model, Names(model), scope, decoder=is_decoder(model))

    @classmethod
    def from_model(
        cls,
        base: Checkpoint,
        model: transformers.PreTrainedModel,
        names: Names,
        scope: Scope = "auto",
        *,
        decoder: bool,
    ) -> ModelLayout:
        """Find the layers of a model that is already built, on whatever device.

        Args:
            base: the checkpoint with its weights.
            model: the model they belong to; only its structure is used.
            names: of the model.
            scope: as for ``from_checkpoint``.
            decoder: whether the model is a causal language model.

        Raises:
            InputError: as ``from_checkpoint``.
        """
        table = names.table(base.names, base.role)
        lists = repeated_layers(model)
        _check_against_config(base, model, names, table, list(lists))
        paths, notes = layer_paths(model, lists, scope, decoder)
        layers: list[LayerSpec] = []
        modules: dict[str, nn.Module] = {}
        for path, layer_scope in paths:
            module = model.get_submodule(path)
            if layer_scope == "experts":
                found = find_experts(base, table, names.strip(path), module, model.config)
                for expert in found:
                    layers.append(_expert_spec(expert))
                    modules[expert.name] = expert.module
                continue
            spec = _layer_spec(base, names, table, path, layer_scope, module)
            layers.append(spec)
            modules[spec.name] = module
        owned = {name for spec in layers for name in spec.parameters.values()}
        outside = [name for name in base.names if name not in owned]
        tied = _tied(base, model, names, table)
        unknown = [n for key, n in table.items() if key not in names.keys and n not in owned]
        if unknown:
            notes.append(
                f"tensors of the {base.role} that belong to no part of {type(model).__name__} are "
                f"copied as they are: {some(unknown)}"
            )
        if tied:
            notes.append(f"tied, written once: {some(tied)}")
        return cls(
            base, model, layers, outside, names, table, tied, decoder, base.notes + notes, modules
        )

    def build(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        """The layer as a module with these weights, in eval mode.

        Args:
            spec: one of ``layers``.
            tensors: {name in the layer: tensor} for every name of ``spec.tensors``; floating
                point tensors are converted to ``dtype``. Those already in it are used as they
                are, not copied.
            dtype: of the module: float32, or float64 for reference computations.

        Raises:
            InputError: a tensor is missing, unknown, or of another shape.

        Cost: no random initialisation; memory for what must be converted.
        """
        expected = {
            name: tuple(t.shape) for name, t in self._modules[spec.name].state_dict().items()
        }
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != expected:
            name = next(n for n in (*expected, *got) if expected.get(n) != got.get(n))
            raise InputError(
                f"tensor {name!r} of layer {spec.name}",
                expected=expected.get(name),
                got=got.get(name),
            )
        module = self._modules[spec.name]
        shared = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
        module = copy.deepcopy(module, memo=dict(shared))
        module.load_state_dict(
            {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()},
            assign=True,
        )
        for name, buffer in self._computed_buffers(spec).items():
            owner, _, leaf = name.rpartition(".")
            value = buffer.to(dtype) if buffer.is_floating_point() else buffer
            module.get_submodule(owner)._buffers[leaf] = value.clone()
        return module.eval()

    def _computed_buffers(self, spec: LayerSpec) -> dict[str, torch.Tensor]:
        """Buffers no checkpoint holds (causal masks, frequencies), with their real values.

        They exist only after the layer's own constructor ran for real: done once per layer.
        """
        if spec.name not in self._buffers:
            layer = self._modules[spec.name]
            stored = layer.state_dict().keys()
            missing = [name for name, _ in layer.named_buffers() if name not in stored]
            values: dict[str, torch.Tensor] = {}
            if missing:
                path = next(p for p, m in self.model.named_modules() if m is layer)
                if type(layer) not in self._arguments:
                    self._arguments[type(layer)] = constructor_arguments(self.model, type(layer))
                args, keywords = self._arguments[type(layer)][path]
                with quiet():
                    real = dict(type(layer)(*args, **keywords).named_buffers())
                values = {name: real[name] for name in missing}
            self._buffers[spec.name] = values
        return self._buffers[spec.name]


def _expert_spec(expert: Expert) -> LayerSpec:
    shapes = {name: tuple(p.shape) for name, p in expert.module.named_parameters()}
    return LayerSpec(
        name=expert.name,
        scope="mlp",
        kind=type(expert.module).__name__,
        parameters=expert.parameters,
        buffers={},
        shapes=shapes,
        numel=sum(math.prod(shape) for shape in shapes.values()),
        width=input_width(expert.module),
    )


def _layer_spec(
    base: Checkpoint,
    names: Names,
    table: dict[str, str],
    path: str,
    scope: str,
    module: nn.Module,
) -> LayerSpec:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    keys = {local: names.strip(f"{path}.{local}") for local in module.state_dict()}
    missing = [key for key in keys.values() if key not in table]
    if missing:
        fused = " (this transformers version fuses or splits some tensors of this model on loading)"
        candidates = [name for key, name in table.items() if key not in names.keys]
        raise InputError(
            f"{len(missing)} tensors of layer {names.strip(path)} ({type(module).__name__}) are "
            f"not in the {base.role} {base.path}{fused if names.fused else ''}",
            expected=some(missing),
            got=f"unmatched: {some(candidates)}" if candidates else None,
            fix="Checkpoints must hold the tensors config.json describes, one by one",
        )
    return LayerSpec(
        name=names.strip(path),
        scope=scope,
        kind=type(module).__name__,
        parameters={local: table[key] for local, key in keys.items() if local in parameters},
        buffers={local: table[key] for local, key in keys.items() if local not in parameters},
        shapes={local: tuple(p.shape) for local, p in parameters.items()},
        numel=sum(p.numel() for p in parameters.values()),
        width=input_width(module),
    )


def _check_against_config(
    base: Checkpoint,
    model: transformers.PreTrainedModel,
    names: Names,
    table: dict[str, str],
    lists: list[str],
) -> None:
    """config.json and weights must describe the same model, tensor by tensor."""
    where = f"config.json and the weights of the {base.role} {base.path} disagree"
    for key, tensor in model.state_dict().items():
        name = table.get(names.strip(key))
        if name is not None and base.names[name].shape != tuple(tensor.shape):
            raise InputError(
                f"{where} on tensor {name!r}",
                expected=f"{list(tensor.shape)} by config.json",
                got=f"{list(base.names[name].shape)} in the weights",
                fix="The directory mixes files of two models: put the right config.json there",
            )
    prefixes = tuple(f"{names.strip(path)}." for path in lists)
    beyond = [
        name
        for key, name in table.items()
        if key not in names.keys
        and key.startswith(prefixes)
        and name not in names.fused
        and key.rsplit(".", 1)[-1] in ("weight", "bias")
    ]
    if beyond:
        raise InputError(
            f"{where}: the weights have {len(beyond)} layer tensors that config.json does not "
            "provide for",
            expected=_layer_counts(model, names, lists),
            got=some(beyond),
            fix="The directory mixes files of two models: put the right config.json there",
        )


def _layer_counts(model: nn.Module, names: Names, lists: list[str]) -> str:
    counts: list[str] = []
    for path in lists:
        layers: Any = model.get_submodule(path)
        counts.append(f"{len(layers)} layers in {names.strip(path)}")
    return ", ".join(counts[:SHOWN])


def _tied(
    base: Checkpoint, model: transformers.PreTrainedModel, names: Names, table: dict[str, str]
) -> dict[str, str]:
    """Tensors the model ties together that the base stores twice with equal contents."""
    first: dict[int, str] = {}
    tied = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        name = table.get(names.strip(key))
        if name is None:
            continue
        source = first.setdefault(id(parameter), name)
        if source != name and (base.aliases.get(name) == source or _equal(base, name, source)):
            tied[name] = source
    return tied


def _equal(base: Checkpoint, a: str, b: str) -> bool:
    tensors = base.read([a, b])
    return torch.equal(tensors[a], tensors[b])
