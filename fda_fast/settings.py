"""From a configuration and a preset to one value for every setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fda_fast.conditional import Setting, chain, evaluate
from fda_fast.config import MergeConfig, Parameters, suggestion
from fda_fast.errors import InputError
from fda_fast.presets import (
    PRESETS,
    AdaptSettings,
    ConstructSettings,
    Preset,
    Scope,
    Start,
    StartSettings,
    default_preset,
)
from fda_fast.references import without_revision
from fda_fast.work import file_name


@dataclass(frozen=True)
class Settings:
    """Everything that decides a merge beside the checkpoints.

    Attributes:
        method: "fda", or the starting point alone.
        preset: name of the preset that filled the gaps.
        scope: "block" or "mlp".
        start: starting point of adaptation, or the method itself.
        construct: construction's settings.
        adapt: adaptation's settings.
        starting: the starting point's settings.
        weights: factor of every expert's task vector in Task Arithmetic, which may differ
            between tensors: see ``factors``.
        outside: where tensors outside the layers come from, "pretrained" or "start".
        engine: "auto", "program" or "autograd".
        precision: "auto", "fp32", "tf32" or "bf16".
        dtype: name of the written dtype, None for the base's own.
        scaling: factor of the merged task vector where it differs between tensors; None: it is
            ``starting.scaling``.
    """

    method: str
    preset: str
    scope: Scope
    start: Start
    construct: ConstructSettings
    adapt: AdaptSettings
    starting: StartSettings
    weights: tuple[Setting, ...]
    outside: Literal["pretrained", "start"]
    engine: str
    precision: str
    dtype: str | None
    scaling: Setting | None = None

    def factor(self, name: str, position: float) -> float:
        """Factor of the merged task vector of one tensor.

        Args:
            name: of the tensor in the base.
            position: depth of its layer, see ``conditional.layer_positions``.
        """
        if self.scaling is None:
            return self.starting.scaling
        found = evaluate(self.scaling, name, position)
        return self.starting.scaling if found is None else found

    def factors(self, name: str, position: float) -> list[float]:
        """Factors of the experts' task vectors of one tensor in Task Arithmetic."""
        weights = [evaluate(weight, name, position) for weight in self.weights]
        return [
            self.factor(name, position) * (1.0 if weight is None else weight) for weight in weights
        ]

    @property
    def optimises(self) -> bool:
        """Whether there are anchors at all, or only a starting point is written."""
        return self.method == "fda"

    def as_dict(self) -> dict[str, Any]:
        """Nested dict of JSON values, the same for the same settings."""
        found = dataclasses.asdict(self)
        if not self.optimises:  # what a plain merge does not use cannot make it another merge
            for unused in ("construct", "adapt", "engine", "precision", "preset"):
                del found[unused]
        return found


def named_preset(name: str) -> Preset:
    """The preset of this name; InputError suggests the nearest one otherwise."""
    if name not in PRESETS:
        raise InputError(
            "preset", expected=" | ".join(PRESETS), got=repr(name), fix=suggestion(name, PRESETS)
        )
    return PRESETS[name]


def choose_preset(
    name: str | None,
    *,
    scope: Scope,
    width: int,
    n_params: int,
    model: Mapping[str, Any] | None,
) -> Preset:
    """The preset asked for, the published one of this very model, or the default.

    Args:
        name: what the configuration says, or None.
        scope: of the layers found.
        width: their input width.
        n_params: elements of one layer.
        model: the base's ``config.json``, if it has one.

    Raises:
        InputError: an unknown name.
    """
    if name is not None:
        return named_preset(name)
    model = model or {}
    published = {
        ("roberta", 768, 12, "block"): "roberta-base",
        ("roberta", 1024, 24, "block"): "roberta-large",
        ("llama", 5120, 40, "mlp"): "llama-mlp",
    }
    kind = (model.get("model_type"), width, model.get("num_hidden_layers"), scope)
    if kind in published:
        return PRESETS[published[kind]]
    return default_preset(width, scope, n_params=n_params)


def requested_scope(parameters: Parameters) -> Literal["auto", "block", "mlp"]:
    """The scope to look for layers with: asked for, the preset's, or "auto"."""
    if parameters.scope == "auto" and parameters.preset is not None:
        return named_preset(parameters.preset).scope
    return parameters.scope


def resolve(config: MergeConfig, preset: Preset, scope: Scope) -> Settings:
    """The configuration's explicit values over the preset's.

    Args:
        config: what the user wrote.
        preset: from ``choose_preset``.
        scope: of the layers found.

    Raises:
        InputError: values that contradict each other.
    """
    given = config.parameters
    start: Start = (
        (given.start or "pretrained") if config.merge_method == "fda" else config.merge_method
    )
    construct = _replace(
        preset.construct,
        given,
        {
            "anchors": "anchors",
            "tokens": "tokens",
            "steps": "steps",
            "lr": "lr",
            "weight_decay": "weight_decay",
            "betas": "betas",
            "patience": "patience",
            "distance": "distance",
            "init": "init",
            "scale": "scale",
            "seed": "seed",
        },
    )
    if given.scale is not None and construct.init != "gaussian":
        raise InputError(
            "scale has no meaning with init: weights", got=given.scale, fix="Set init: gaussian."
        )
    if scope == "mlp":
        if given.tokens is not None:
            raise InputError(
                "tokens", expected="none: the layers are MLPs, which take single vectors",
                got=given.tokens, fix="Set anchors alone, or scope: block.",
            )  # fmt: skip
        construct = dataclasses.replace(construct, tokens=None)
    elif construct.tokens is None:
        raise InputError(
            f"preset {preset.name} is for MLPs, the layers are whole blocks",
            fix="Give tokens, another preset, or scope: mlp.",
        )
    adapt = _replace(
        preset.adapt(start),
        given,
        {
            "adapt_lr": "lr",
            "batch_size": "batch_size",
            "adapt_distance": "distance",
        },
    )
    if isinstance(given.epochs, tuple):
        adapt = dataclasses.replace(adapt, epochs=given.epochs[-1], snapshots=given.epochs)
    elif given.epochs is not None:
        adapt = dataclasses.replace(adapt, epochs=given.epochs)
    starting = preset.start(start)
    if isinstance(given.scaling, float):
        starting = dataclasses.replace(starting, scaling=given.scaling)
    if given.scaling is not None and start == "pretrained":
        raise InputError(
            "scaling has no meaning with start: pretrained",
            fix="Choose start: task_arithmetic, tsv or wudi.",
        )
    plain = given.scaling is None or isinstance(given.scaling, tuple)
    if plain and start == "task_arithmetic" and config.weighted:
        starting = dataclasses.replace(starting, scaling=1.0)  # mergekit's lambda
    if adapt.per_task:
        adapt = dataclasses.replace(adapt, coefficient=starting.scaling)
    return Settings(
        method=config.merge_method,
        preset=preset.name,
        scope=scope,
        start=start,
        construct=construct,
        adapt=adapt,
        starting=starting,
        weights=_weights(config),
        outside=_outside(config, preset),
        engine=given.engine,
        precision=given.precision,
        dtype=config.written_dtype,
        scaling=given.scaling if isinstance(given.scaling, tuple) else None,
    )


def _replace(settings: Any, given: Parameters, fields: Mapping[str, str]) -> Any:
    values = {field: getattr(given, key) for key, field in fields.items()}
    return dataclasses.replace(
        settings, **{field: value for field, value in values.items() if value is not None}
    )


def _weights(config: MergeConfig) -> tuple[Setting, ...]:
    chains = (chain(e.parameters.weight, config.parameters.weight) for e in config.models)
    return tuple(1.0 if weight is None else weight for weight in chains)


def _outside(config: MergeConfig, preset: Preset) -> Literal["pretrained", "start"]:
    """A plain merge merges every tensor, as its method says; FDA as published."""
    if config.parameters.outside is not None:
        return config.parameters.outside
    return preset.outside if config.merge_method == "fda" else "start"


def task_names(references: Sequence[str], given: Sequence[str | None]) -> list[str]:
    """A name for every expert: the given one, or the last part of its path, made unique.

    The names seed the anchors and name their files, so they depend on nothing else.
    """
    names: list[str] = []
    taken = {name.casefold() for name in given if name is not None}
    for reference, name in zip(references, given, strict=True):
        if name is not None:
            names.append(name)
            continue
        wanted = unique = file_name(_last_part(reference))
        count = 1
        while unique.casefold() in taken:  # some file systems ignore case
            count += 1
            unique = f"{wanted}-{count}"
        taken.add(unique.casefold())
        names.append(unique)
    return names


def _last_part(reference: str) -> str:
    """Folder name, skipping the names that every training run gives its best checkpoint."""
    reference = without_revision(reference)
    parts = [part for part in reference.replace("\\", "/").split("/") if part not in ("", ".")]
    generic = ("model", "final", "best", "checkpoint", "output", "adapter", "merged")
    while len(parts) > 1 and (parts[-1] in generic or parts[-1].startswith("checkpoint-")):
        parts.pop()
    return parts[-1] if parts else "expert"
