"""The model a config.json describes, built on the meta device: names and shapes, no memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from torch import nn

from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

_DTYPE_KEYS = ("dtype", "torch_dtype")


def build_skeleton(base: Checkpoint) -> transformers.PreTrainedModel:
    """The transformers model of a checkpoint, every parameter on the meta device.

    The class is the one config.json names under ``architectures`` where transformers has it, and
    the plain model of that type otherwise. Code shipped with a checkpoint is never run.

    Raises:
        InputError: no config.json, a model type transformers lacks, a config it refuses.

    Cost: 0.1 to 1 s, no weights, hardly any memory.
    """
    where = f"config.json of the {base.role} {base.path}"
    if base.config is None:
        raise InputError(
            f"the {base.role} {base.path} has no config.json",
            expected="a Hugging Face model directory",
            fix="The base model's config.json tells what its layers are: give a directory that "
            "holds it beside the weights",
        )
    config = _without_dtype(base.config)
    if "use_pretrained_backbone" in config:
        config["use_pretrained_backbone"] = False  # or the constructor would download one
    model_type = config.pop("model_type", None) or _guess_model_type(base)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"model_type in {where}",
            expected=f"one that transformers {transformers.__version__} has",
            got=repr(model_type),
            fix="Code shipped with a checkpoint is not run; a newer transformers may know it",
        )
    try:
        with quiet():
            parsed = transformers.CONFIG_MAPPING[model_type].from_dict(config)
            return construct(_model_class(parsed, config), parsed)
    except Exception as error:  # whatever a wrong value in a config makes of a constructor
        reason = str(error).strip().split("\n")[0][:300]
        raise InputError(
            f"{where} describes no model that transformers {transformers.__version__} can build",
            got=f"{type(error).__name__}: {reason}",
        ) from error


def construct(
    kind: type[transformers.PreTrainedModel],
    config: Any,
    attention: tuple[str, ...] = ("sdpa", "eager"),
) -> transformers.PreTrainedModel:
    """A model of this class and config on the meta device, with the first attention it takes."""
    with torch.device("meta"):
        for choice in attention:
            try:
                # The constructor writes into the config.
                model = kind._from_config(copy.deepcopy(config), attn_implementation=choice)
                break
            except (ValueError, ImportError):  # a model without sdpa says so in one of these
                if choice == attention[-1]:
                    raise
    model.tie_weights()
    return model.eval()


def as_saved(
    model: transformers.PreTrainedModel, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A state dict by the names and shapes that ``save_pretrained`` writes.

    transformers 5 fuses some tensors when it loads, such as the experts of a mixture, and takes
    them apart again when it saves.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 saves what a model holds
        return state
    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return saved


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks about configs, which concern running the model."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def constructor_arguments(
    model: transformers.PreTrainedModel, kind: type[nn.Module]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """How each module of class ``kind`` was constructed, by module path.

    Builds the model once more on the meta device while watching that class: the only way to make
    one layer again, alone and for real, that needs no knowledge of its constructor.
    """
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    kept = []  # so that no id is given twice
    original: Callable[..., None] = kind.__init__
    attention = getattr(model.config, "_attn_implementation", None) or "eager"

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        calls[id(self)] = (args, kwargs)
        kept.append(self)
        original(self, *args, **kwargs)

    kind.__init__ = watched  # type: ignore[method-assign]
    try:
        with quiet():
            again = construct(type(model), model.config, (attention,))
    finally:
        kind.__init__ = original  # type: ignore[method-assign]
    return {path: calls[id(m)] for path, m in again.named_modules() if id(m) in calls}


def is_decoder(model: transformers.PreTrainedModel) -> bool:
    """Whether the checkpoint is a language model that reads left to right."""
    from transformers.models.auto import modeling_auto as auto

    if type(model).__name__ in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        # BERT and its kin are in this mapping too, and are decoders only when told to be.
        return model.config.model_type not in _masked_types() or bool(
            getattr(model.config, "is_decoder", False)
        )
    return (
        model.config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model.config.model_type not in _masked_types()
    )


def _masked_types() -> Iterable[str]:
    from transformers.models.auto import modeling_auto as auto

    return auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _model_class(config: Any, raw: dict[str, Any]) -> type[transformers.PreTrainedModel]:
    for name in raw.get("architectures") or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    found = transformers.MODEL_MAPPING[type(config)]
    kind: Any = found[0] if isinstance(found, tuple) else found
    return cast("type[transformers.PreTrainedModel]", kind)


def _without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """The config, deep, without the dtypes it was saved in: layers are worked on in float32."""
    return {
        key: _without_dtype(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _DTYPE_KEYS
    }


def _guess_model_type(base: Checkpoint) -> str | None:
    """The model type of a config of before 2020, which had none, by the tensors' first word."""
    first = {name.split(".", 1)[0] for name in base.names}
    found = [word for word in sorted(first) if word in transformers.CONFIG_MAPPING]
    if len(found) != 1:
        return None
    base.notes.append(
        f"config.json of the {base.role} has no model_type: taken for {found[0]!r} by its tensors"
    )
    return found[0]
