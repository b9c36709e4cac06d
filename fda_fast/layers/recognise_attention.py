"""The attention of a block: projections in every naming, heads, scale, rotary tables, norms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fda_fast.layers import call
from fda_fast.layers.attention import Attention, PerHead
from fda_fast.layers.combinators import Sequential
from fda_fast.layers.parameter import Materials
from fda_fast.layers.program import Node
from fda_fast.layers.recognise_parts import (
    Chain,
    LinearPart,
    NormPart,
    NotRecognised,
    Part,
    Scope,
    chain,
    find_linear,
    find_norm,
)
from fda_fast.ops.attention import Heads

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_PACKED = ("c_attn", "qkv_proj", "qkv")
_OUTPUT = ("o_proj", "out_proj", "c_proj", "proj")


@dataclass(frozen=True)
class AttentionPart(Part):
    """Norms of q and k heads, rotary embedding, attention; on packed rows.

    Attributes:
        heads: layout, scale, causality.
        layer: the block that rotary tables are made for.
        rotary: whether q and k are rotated.
        q_norm, k_norm: norms over single heads, or None.
    """

    heads: Heads
    # Not compared: a fine-tuned layer's recipe is its pretrained layer's.
    layer: nn.Module = field(compare=False, repr=False)
    rotary: bool = False
    q_norm: NormPart | None = None
    k_norm: NormPart | None = None

    def names(self) -> list[str]:
        """See ``Part.names``."""
        return [n for norm in (self.q_norm, self.k_norm) if norm is not None for n in norm.names()]

    def sequences(self) -> bool:
        """See ``Part.sequences``."""
        return True

    def build(self, materials: Materials) -> Node:
        """See ``Part.build``."""
        heads, rope = self.heads, None
        if self.rotary:
            like = torch.empty(1, materials.tokens, 1, dtype=materials.dtype)
            like = like.to(materials.device)
            cos, sin = call.rotary_tables(self.layer, like)
            rope = cos[0], sin[0]
        attention = Attention(heads, materials.tokens, materials.precision, rope)
        if self.q_norm is None and self.k_norm is None:
            return attention
        norms = [
            None if norm is None else norm.build(materials) for norm in (self.q_norm, self.k_norm)
        ]
        segments = [(heads.query, norms[0]), (heads.key_value, norms[1]), (heads.key_value, None)]
        return Sequential([PerHead(segments, heads.size), attention])


def find_attention(block: nn.Module, scope: Scope | None, output: Scope | None = None) -> Chain:
    """Projections, attention and output projection.

    Args:
        block: the whole layer; it says whether attention is causal and has rotary tables.
        scope: the module that holds the projections.
        output: the output projection, where it is not one of that module's own.

    Raises:
        NotRecognised: projections, heads or norms that do not fit together.
    """
    if scope is None:
        raise NotRecognised("attention is missing where its block has one")
    projections = _find_projections(scope)
    rotary = call.wants_rotary_tables(block)
    heads = _find_heads(block, scope, projections)
    q_norm = k_norm = None
    if scope.has("q_norm") or scope.has("k_norm"):
        q_norm = find_norm(scope.child("q_norm"), heads.size)
        k_norm = find_norm(scope.child("k_norm"), heads.size)
    # softmax does not see what a key bias adds to all scores of a query alike
    if len(projections.segments) == 3 and not rotary and k_norm is None and not heads.softcap:
        key_bias = projections.segments[1][1]
        if key_bias is not None:
            projections = replace(projections, without_gradient=(key_bias,))
    attention = AttentionPart(heads, block, rotary, q_norm, k_norm)
    return chain(projections, attention, find_linear(output or scope.child(*_OUTPUT)))


def _find_projections(scope: Scope) -> LinearPart:
    for names in _SEPARATE:
        if scope.has(*names):
            return find_linear(*(scope.child(name) for name in names))
    packed = scope.child(*_PACKED)
    if packed is not None:
        return find_linear(packed)
    weight = getattr(scope.module, "in_proj_weight", None)  # nn.MultiheadAttention, open_clip
    if weight is None:
        raise NotRecognised(f"no q, k and v projections in {scope.prefix[:-1]}")
    for extra in ("bias_k", "bias_v"):
        if scope.parameter(extra):
            raise NotRecognised(f"{scope.prefix}{extra} appends a key of its own")
    if getattr(scope.module, "add_zero_attn", False):
        raise NotRecognised(f"{scope.prefix[:-1]} appends a zero key")
    segment = (f"{scope.prefix}in_proj_weight", scope.parameter("in_proj_bias"))
    return LinearPart((segment,), (weight.shape[0],))


def _find_heads(block: nn.Module, scope: Scope, projections: LinearPart) -> Heads:
    query = scope.attribute("num_attention_heads", "num_heads", "n_head")
    config = call.layer_config(block)
    if query is None:
        query = getattr(config, "num_attention_heads", None)
    if query is None:
        raise NotRecognised(f"{scope.prefix[:-1]} does not say its number of heads")
    total = sum(projections.outputs)
    if len(projections.outputs) == 3:
        size, rest = divmod(projections.outputs[0], query)
        key_value, rest_k = divmod(projections.outputs[1], size or 1)
        fits = not rest and not rest_k and projections.outputs[1] == projections.outputs[2]
    else:
        key_value = scope.attribute("num_key_value_heads")
        groups = scope.attribute("num_key_value_groups", default=1)
        key_value = key_value or query // groups
        size, rest = divmod(total, query + 2 * key_value)
        fits = not rest
    if not fits or not size or not key_value or query % key_value:
        raise NotRecognised(f"{scope.prefix[:-1]}: {query} heads do not divide {total} columns")
    scale = scope.attribute("scaling", "scale")
    if scale is None:
        if not getattr(scope.module, "scale_attn_weights", True) or getattr(
            scope.module, "scale_attn_by_inverse_layer_idx", False
        ):
            raise NotRecognised(f"{scope.prefix[:-1]} scales its scores in a way of its own")
        scale = size**-0.5
    causal = call.is_causal(block)
    return Heads(
        int(query),
        int(key_value),
        int(size),
        float(scale),
        causal=causal,
        window=call.sliding_window(block) if causal else None,
        softcap=scope.attribute("attn_logit_softcapping"),
    )
