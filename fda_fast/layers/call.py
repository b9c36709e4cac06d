"""Run any layer on one tensor of anchors: x [n, T, d] or [n, d] -> y [n, (T,) d_out].

Layers come from libraries whose blocks want masks, rotary tables, another order of dimensions,
and return tuples. All of that is settled here, once, so that every other file may write
``call_layer(layer, x)``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fda_fast.errors import InputError

# Arguments some blocks demand and every one of them treats as "not given" when None.
_NONE_ARGUMENTS = (
    "head_mask",
    "layer_past",
    "past_key_value",
    "past_key_values",
    "cache_position",
    "causal_attention_mask",
    "output_attentions",
    "encoder_hidden_states",
    "encoder_attention_mask",
)
_WRAP = "Wrap the layer in a module whose forward takes and returns one tensor"
_ROTARY = ("position_embeddings", "position_embeddings_global")


def call_layer(
    layer: nn.Module,
    x: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> Tensor:
    """Output of a layer on anchors, twice differentiable in x and in the parameters.

    Runs in eval mode whatever mode the layer is in (dropout would be noise in the loss) and with
    the MATH attention backend, the only one with a second derivative.

    - Hugging Face decoder blocks get (cos, sin) of positions 0..T-1 from the rotary module of
      their own library and config, and a causal mask; encoders get no mask.
    - open_clip blocks and others around a sequence-first ``nn.MultiheadAttention`` get x as
      [T, n, d]; anchors stay [n, T, d] here.
    - Of a tuple or list output the first entry is taken.

    Args:
        layer: any module that maps one tensor to a tensor of the same leading shape.
        x: [n, T, d] for blocks, [n, d] for layers on vectors; the layer's dtype and device.
        parameters: tensors to use in place of the layer's own, by ``named_parameters()`` name.
        keywords: what ``call_keywords(layer, x)`` gave before, to spare a loop that work.

    Returns:
        [n, T, d_out] or [n, d_out].

    Raises:
        InputError: the layer demands an argument that is not known here, wants rotary tables
            but has no config to make them from, or does not return a tensor.
    """
    keywords = call_keywords(layer, x) if keywords is None else dict(keywords)
    sequence_first = x.dim() == 3 and _is_sequence_first(layer)
    if sequence_first:
        x = x.transpose(0, 1)
    with evaluating(layer), sdpa_kernel(SDPBackend.MATH):
        try:
            if parameters is None:
                y = layer(x, **keywords)
            else:
                y = functional_call(layer, dict(parameters), (x,), keywords)
        except (AttributeError, TypeError) as reason:  # what a missing argument looks like inside
            raise InputError(
                f"{type(layer).__name__} does not run on one tensor",
                got=f"{type(reason).__name__}: {reason}",
                fix=_WRAP,
            ) from reason
    if isinstance(y, (tuple, list)):
        y = y[0]
    if not isinstance(y, Tensor):
        raise InputError(
            f"output of {type(layer).__name__}",
            expected="a tensor, or a tuple that starts with one",
            got=type(y).__name__,
            fix=_WRAP,
        )
    return y.transpose(0, 1) if sequence_first else y


@contextlib.contextmanager
def evaluating(layer: nn.Module) -> Iterator[None]:
    """Eval mode for the duration, each sub-module's own mode restored afterwards."""
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_causal(layer: nn.Module) -> bool:
    """Whether the layer's self-attention looks only back (Hugging Face's own markings)."""
    if getattr(layer_config(layer), "model_type", None) == "clip_text_model":
        return True  # causal by the mask its model passes; the block itself is not marked
    for name, module in layer.named_modules():
        if "cross" in name.lower():
            continue
        if getattr(module, "is_causal", False) is True or getattr(module, "is_decoder", False):
            return True
    return False


def sliding_window(layer: nn.Module) -> int | None:
    """Number of positions a query sees, itself included; None when it sees all before it."""
    for module in layer.modules():
        window = getattr(module, "sliding_window", None)
        if window is not None and getattr(module, "is_sliding", True):
            return int(window)
    # Mistral keeps the window in its config only; the others mark the attention module.
    config = layer_config(layer)
    if getattr(config, "model_type", None) == "mistral":
        window = getattr(config, "sliding_window", None)
        return None if window is None else int(window)
    return None


def layer_config(layer: nn.Module) -> Any:
    """The Hugging Face config a layer or one of its sub-modules carries, or None."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        if config is not None:
            return config
    return None


def causal_mask(layer: nn.Module, x: Tensor) -> Tensor:
    """Additive mask [n, 1, T, T]: 0 where a query may look, the lowest number elsewhere.

    Passed explicitly because eager attention ignores ``is_causal``, and sdpa's own causal path
    knows no sliding window.
    """
    tokens = x.shape[1]
    distance = torch.arange(tokens, device=x.device)
    distance = distance[:, None] - distance[None, :]
    seen = distance >= 0
    window = sliding_window(layer)
    if window is not None:
        seen &= distance < window
    mask = torch.zeros(1, 1, tokens, tokens, dtype=x.dtype, device=x.device)
    mask = mask.masked_fill(~seen, torch.finfo(x.dtype).min)
    return mask.expand(x.shape[0], -1, -1, -1)  # CLIP before transformers 4.5x checks the shape


def wants_rotary_tables(layer: nn.Module) -> bool:
    """Whether the layer's forward takes rotary tables (cos, sin)."""
    return any(name in _ROTARY for name in inspect.signature(layer.forward).parameters)


def rotary_tables(
    layer: nn.Module, x: Tensor, *, local: bool | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [1, T, head_dim], of positions 0..T-1, as the layer's library makes them.

    Args:
        layer: a Hugging Face decoder block.
        x: [n, T, d]; gives T, dtype and device.
        local: for Gemma 3 of transformers < 5, whose layers are given two tables: the one of its
            sliding-window layers, or the other. Default: the one the layer uses.

    Raises:
        InputError: no config on the layer, or no rotary module beside its class.
    """
    config = layer_config(layer)
    library = sys.modules[type(layer).__module__]
    rotary = next(
        (
            value
            for name, value in vars(library).items()
            if name.endswith("RotaryEmbedding")
            and getattr(value, "__module__", None) == library.__name__
        ),
        None,
    )
    if config is None or rotary is None:
        raise InputError(
            f"{type(layer).__name__} wants position_embeddings",
            expected="a config on the layer and a RotaryEmbedding class in its module",
            got="no config" if config is None else f"none in {type(layer).__module__}",
            fix="Wrap the layer in a module that passes them itself",
        )
    if local is None:
        handed = inspect.signature(layer.forward).parameters
        local = "position_embeddings_local" in handed and sliding_window(layer) is not None
    if local:
        config = copy.deepcopy(config)
        config.rope_theta = config.rope_local_base_freq
        config.rope_scaling = {"rope_type": "default"}
    table = rotary(config).to(x.device)
    positions = torch.arange(x.shape[1], device=x.device)[None]
    if "layer_type" in inspect.signature(table.forward).parameters:
        return table(x, positions, layer_type=_layer_type(layer, config))
    return table(x, positions)


def _layer_type(layer: nn.Module, config: Any) -> str:
    for module in layer.modules():
        kind = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
        if kind is not None:
            return kind
    index = next((m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")), 0)
    return config.layer_types[index or 0]


def _is_sequence_first(layer: nn.Module) -> bool:
    return any(
        isinstance(module, nn.MultiheadAttention) and not module.batch_first
        for module in layer.modules()
    )


def call_keywords(layer: nn.Module, x: Tensor) -> dict[str, Any]:
    """Everything but x that the layer's forward needs for x of this shape, dtype and device."""
    signature = inspect.signature(layer.forward)
    keywords: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        if index == 0 or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        if name == "attention_mask":
            if x.dim() == 3 and is_causal(layer):
                keywords[name] = causal_mask(layer, x)
            elif required:
                keywords[name] = None
        elif name in _ROTARY:
            keywords[name] = rotary_tables(layer, x, local=False)
        elif name == "position_embeddings_local":
            keywords[name] = rotary_tables(layer, x, local=True)
        elif name == "position_ids" and x.dim() == 3:
            keywords[name] = torch.arange(x.shape[1], device=x.device)[None]
        elif required and isinstance(layer, nn.MultiheadAttention):
            keywords[name] = x.transpose(0, 1) if _is_sequence_first(layer) else x
        elif required and name in _NONE_ARGUMENTS:
            keywords[name] = None
        elif required:
            raise InputError(
                f"{type(layer).__name__}.forward demands {name!r}",
                expected="a layer callable on one tensor",
                fix=_WRAP,
            )
    return keywords
