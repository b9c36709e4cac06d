"""The merge configuration: YAML that a mergekit user reads at sight, checked before any work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fda_fast.conditional import TensorSetting, chain, covers
from fda_fast.config_refused import REFUSED, REFUSED_METHODS
from fda_fast.config_values import (
    SHORT,
    Betas,
    Count,
    Epochs,
    NotNegative,
    Positive,
    Scale,
    no_bool,
)
from fda_fast.errors import InputError
from fda_fast.references import absolute
from fda_fast.yamlfile import read_yaml

Start = Literal["pretrained", "task_arithmetic", "tsv", "wudi"]
Distance = Literal["cosine", "l2", "l1"]
Dtype = Literal["float32", "float16", "bfloat16"]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The entry of ``known`` that ``word`` is a likely misspelling of, or None."""
    spelled = {name.replace("-", "_").lower(): name for name in known}
    found = difflib.get_close_matches(word.replace("-", "_").lower(), spelled, 1, 0.55)
    return spelled[found[0]] if found else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """A sentence for ``InputError.fix``: the likely spelling, or all known ones."""
    names = list(known)
    found = nearest(word, names)
    return f"Did you mean {found!r}?" if found else f"Known: {', '.join(names)}."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        # Two mergekit keys that change nothing here: its default, and a way to save memory.
        if data.get("normalize") is False:
            data.pop("normalize")
        data.pop("int8_mask", None)
        return data


class ModelParameters(_Strict):
    """Parameters of one expert."""

    weight: TensorSetting | None = None


class ModelEntry(_Strict):
    """One expert: a checkpoint folder, or a PEFT adapter as ``base+adapter``.

    Attributes:
        model: path of the checkpoint, of a PEFT adapter, or ``path+adapter``.
        name: what the expert is called in reports and anchors files; default: its folder.
        parameters: its own parameters.
    """

    model: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}$")] | None = None
    parameters: ModelParameters = ModelParameters()


class Parameters(_Strict):
    """What a merge can be told; None means the preset decides (see ``presets``).

    Attributes:
        preset: published settings by model: see ``presets.PRESETS``; default: by the base model.
        start: where adaptation begins.
        weight: of every expert in Task Arithmetic, unless it has its own; default 1. As in
            mergekit one number, a gradient over the layers, or filters by tensor name.
        scaling: factor of the merged task vector (mergekit's ``lambda``), in the same forms; by
            the preset, or 1, as in mergekit, where weights are given.
        init: anchors from rows of the expert's weights, or Gaussian.
        anchors: number n of anchors per task and layer.
        tokens: tokens T per anchor (whole blocks only).
        scale: standard deviation of Gaussian anchors, or "auto": the best of several on one layer.
        steps: construction steps.
        lr: construction's learning rate.
        weight_decay: construction's weight decay.
        betas: construction's AdamW moments.
        patience: construction of an expert ends when its best loss has not improved over this
            many steps; default: all steps are done.
        distance: what compares layer outputs in construction.
        epochs: adaptation's passes over all anchors; a list writes one model for each number,
            from one run.
        adapt_lr: adaptation's learning rate.
        batch_size: anchors per adaptation step.
        adapt_distance: what compares layer outputs in adaptation.
        engine: "auto", "program" or "autograd".
        precision: "auto", "fp32", "tf32" or "bf16".
        scope: whole blocks, their MLPs, or by architecture ("auto").
        seed: of the anchors' initialisation and of the shuffling.
        outside: where tensors outside the adapted layers come from.
        extra_anchors: folder of real activations to adapt to beside the anchors, in files
            <expert>/<layer>.safetensors as ``fda_fast.save_activations`` writes them.
    """

    preset: str | None = None
    start: Start | None = None
    weight: TensorSetting | None = None
    scaling: TensorSetting | None = Field(
        default=None, validation_alias=AliasChoices("scaling", "lambda")
    )
    init: Literal["weights", "gaussian"] | None = None
    anchors: Count | None = None
    tokens: Count | None = None
    scale: Scale | None = None
    steps: Count | None = None
    lr: Positive | None = None
    weight_decay: NotNegative | None = None
    betas: Betas | None = None
    patience: Count | None = None
    distance: Distance | None = None
    epochs: Epochs | None = None
    adapt_lr: Positive | None = None
    batch_size: Count | None = None
    adapt_distance: Distance | None = None
    engine: Literal["auto", "program", "autograd"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    scope: Literal["auto", "block", "mlp"] = "auto"
    seed: Annotated[int, BeforeValidator(no_bool), Field(ge=0, lt=2**63)] = 0
    outside: Literal["pretrained", "start"] | None = None
    extra_anchors: str | None = None


class LoraOutput(_Strict):
    """An adapter to write beside the merged model.

    Attributes:
        rank: of every matrix's low-rank change.
    """

    rank: Count


class TokenizerSource(_Strict):
    """mergekit's newer spelling of ``tokenizer_source``."""

    source: Literal["base"] = "base"


class MergeConfig(_Strict):
    """A whole merge; the fields of mergekit's YAML that mean something here.

    Attributes:
        merge_method: "fda", or a starting point alone: "task_arithmetic", "tsv", "wudi".
        base_model: path of the pretrained checkpoint.
        models: the experts, at least one.
        parameters: settings.
        dtype: as ``out_dtype``; computations are in float32 whatever it says.
        out_dtype: dtype of the written floating-point tensors; default: the base's own.
        tokenizer_source: only "base".
        out_lora: also write merged - base as a LoRA adapter, in the output's folder ``lora``.
    """

    merge_method: Literal["fda", "task_arithmetic", "tsv", "wudi"]
    base_model: str
    models: Annotated[list[ModelEntry], Field(min_length=1)]
    parameters: Parameters = Parameters()
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Literal["base"] | None = None
    tokenizer: TokenizerSource | None = None
    out_lora: LoraOutput | None = None

    @field_validator("models", mode="after")
    @classmethod
    def _names_differ(cls, models: list[ModelEntry]) -> list[ModelEntry]:
        names = [entry.name for entry in models if entry.name is not None]
        folded = [name.casefold() for name in names]  # names become file names
        for name in names:
            if folded.count(name.casefold()) > 1:
                raise ValueError(f"two models are named {name!r}")
        return models

    @model_validator(mode="after")
    def _method_and_start_agree(self) -> MergeConfig:
        start = self.parameters.start
        if self.merge_method != "fda" and start not in (None, self.merge_method):
            raise ValueError(
                f"merge_method is {self.merge_method!r} and start {start!r}: choose one"
            )
        if self.weighted and "task_arithmetic" not in (self.merge_method, start):
            raise ValueError(
                "weight needs merge_method or start task_arithmetic; TSV-M and WUDI weigh "
                "the task vectors themselves, and a pretrained start uses none"
            )
        for entry in self.models:
            whole = chain(entry.parameters.weight, self.parameters.weight)
            if whole is not None and not covers(whole):
                raise ValueError(
                    f"weight of {entry.model}: end its filters with {{value: ...}} for the tensors "
                    "that none of them takes"
                )
        return self

    @property
    def weighted(self) -> bool:
        """Whether task vectors are given weights of their own."""
        weights = [self.parameters.weight, *(entry.parameters.weight for entry in self.models)]
        return any(weight is not None for weight in weights)

    @property
    def written_dtype(self) -> str | None:
        """Name of the dtype of the output, None for the base's own."""
        return self.out_dtype or self.dtype


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> MergeConfig:
    """Read and check a YAML configuration; its relative paths start at the file's folder.

    Args:
        path: the YAML file.
        overrides: values for ``parameters`` that replace the file's, from the command line.

    Raises:
        InputError: unreadable file, YAML syntax, unknown or refused key, value of the wrong
            kind; with the file and the line, or the command line, and the nearest known spelling.
    """
    path = Path(path)
    data, lines = read_yaml(path)
    if overrides:
        try:
            Parameters.model_validate(overrides)
        except ValidationError as error:
            raise _as_input_error(error, "command line", {}, under="parameters") from None
        parameters = data.get("parameters") or {}
        if isinstance(parameters, Mapping):  # what else it may be, parse refuses
            data["parameters"] = {**parameters, **overrides}
    return parse(data, folder=path.parent, where=str(path), lines=lines)


def parse(
    data: Mapping[str, Any],
    *,
    folder: Path | None = None,
    where: str = "configuration",
    lines: Mapping[tuple[str | int, ...], int] | None = None,
) -> MergeConfig:
    """Check a configuration given as nested dicts and lists.

    Args:
        data: the content of a YAML configuration.
        folder: where its relative paths start; None leaves them as they are.
        where: how errors name the source.
        lines: line of every key, for errors.

    Raises:
        InputError: as ``load``.
    """
    try:
        config = MergeConfig.model_validate(data)
    except ValidationError as error:
        raise _as_input_error(error, where, lines or {}) from None
    # mergekit lets the base stand among the models, without parameters.
    models = [entry for entry in config.models if entry.model != config.base_model]
    if not models:
        raise InputError(
            f"{where}: models", expected="at least one expert", got="only the base model"
        )
    base = config.base_model
    if folder is not None:
        base = absolute(base, folder)
        models = [
            entry.model_copy(update={"model": absolute(entry.model, folder)}) for entry in models
        ]
    update: dict[str, Any] = {"base_model": base, "models": models}
    if folder is not None and config.parameters.extra_anchors is not None:
        extra = str(folder / Path(config.parameters.extra_anchors).expanduser())
        update["parameters"] = config.parameters.model_copy(update={"extra_anchors": extra})
    return config.model_copy(update=update)


def _as_input_error(
    error: ValidationError,
    where: str,
    lines: Mapping[tuple[str | int, ...], int],
    under: str | None = None,
) -> InputError:
    problems = error.errors(include_url=False)
    # An unknown key explains a missing one ('base-model'), so it goes first.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    at = tuple(first["loc"]) if under is None else (under, *first["loc"])
    line = lines.get(at) or lines.get(at[:-1])
    place = f"{where}, line {line}" if line else where
    key = ".".join(map(str, at)) or "the file"
    rest = f" ({len(problems) - 1} more problem(s) behind it.)" if len(problems) > 1 else ""
    kind, value = first["type"], first.get("input")
    if kind == "extra_forbidden":
        name = str(at[-1])
        if name in REFUSED:
            return InputError(f"{place}: {key} cannot be used: {REFUSED[name]}", fix=rest.strip())
        fix = suggestion(name, _keys_beside(at)) + rest
        return InputError(f"{place}: {key}: unknown key", fix=fix)
    if kind == "missing":
        return InputError(f"{place}: {key} is missing", fix=rest.strip())
    if kind == "literal_error":
        known = _literals(first)
        if key == "merge_method" and value in REFUSED_METHODS:
            return InputError(
                f"{place}: merge_method {value} is not done here: {REFUSED_METHODS[value]}",
                expected=" or ".join(known),
                fix="Task Arithmetic, TSV-M and WUDI are the starting points of FDA; use mergekit "
                "for this one.",
            )
        return InputError(
            f"{place}: {key}",
            expected=" or ".join(known),
            got=SHORT.repr(value),
            fix=suggestion(value, known) if isinstance(value, str) else None,
        )
    if kind == "value_error":
        reason = first["msg"].removeprefix("Value error, ")
        return InputError(
            f"{place}: {key}: {reason}" if at else f"{place}: {reason}", fix=rest.strip()
        )
    if isinstance(value, list) and at and at[0] == "parameters":
        return InputError(
            f"{place}: {key}",
            expected="one value for the whole model",
            got=SHORT.repr(value),
            fix="Gradients over layers and filters by tensor have no meaning in FDA.",
        )
    if kind in ("model_type", "too_short") and at and at[0] == "models":
        return InputError(
            f"{place}: {key}",
            expected="at least one entry `model: PATH`" if len(at) == 1 else "`model: PATH`",
            got=SHORT.repr(value),
            fix=f"Write `- model: {value}`." if isinstance(value, str) else rest.strip(),
        )
    reason = first["msg"].removeprefix("Input should be ")
    return InputError(f"{place}: {key}", expected=reason, got=SHORT.repr(value), fix=rest.strip())


def _literals(problem: Any) -> list[str]:
    text = str(problem["ctx"]["expected"]).replace(" or ", ", ")
    return [part.strip().strip("'") for part in text.split(",")]


def _keys_beside(at: tuple[str | int, ...]) -> list[str]:
    """The keys that were allowed where the unknown one stood."""
    model: type[BaseModel] = MergeConfig
    if at[0] == "parameters" and len(at) > 1:
        model = Parameters
    elif at[0] == "tokenizer" and len(at) > 1:
        model = TokenizerSource
    elif at[0] == "out_lora" and len(at) > 1:
        model = LoraOutput
    elif at[0] == "models" and len(at) > 2:
        model = ModelParameters if at[2] == "parameters" and len(at) > 3 else ModelEntry
    return list(model.model_fields)
