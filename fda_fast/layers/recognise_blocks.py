"""The block families: which sub-modules make which block. Each returns None for another's."""

from __future__ import annotations

import torch.nn.functional as F

from fda_fast.layers.recognise_attention import find_attention
from fda_fast.layers.recognise_parts import (
    Chain,
    NotRecognised,
    Part,
    Scope,
    around,
    chain,
    find_activation,
    find_linear,
    find_norm,
    find_scale,
)

_ACTIVATION = (
    "act_fn",
    "activation_fn",
    "act",
    "gelu",
    "activation",
    "intermediate_act_fn",
    "hidden_act",
)


def gated_mlp(scope: Scope) -> Part | None:
    """down(phi(gate(x)) * up(x)): Llama, Mistral, Qwen, Gemma; gate and up also packed (Phi 3)."""
    if scope.has("gate_proj", "up_proj", "down_proj"):
        inner = find_linear(scope.child("gate_proj"), scope.child("up_proj"))
        outer = find_linear(scope.child("down_proj"))
    elif scope.has("gate_up_proj", "down_proj"):
        inner = find_linear(scope.child("gate_up_proj"))
        outer = find_linear(scope.child("down_proj"))
    elif scope.has("weights_in", "weights_out"):  # DINOv2 giant before transformers 5
        inner = find_linear(scope.child("weights_in"))
        outer = find_linear(scope.child("weights_out"))
        return chain(inner, find_activation(F.silu, gated=True), outer)
    else:
        return None
    return chain(inner, find_activation(scope.attribute(*_ACTIVATION), gated=True), outer)


def plain_mlp(scope: Scope) -> Part | None:
    """second(phi(first(x))): ViT, CLIP, GPT-2, open_clip."""
    for first, second in (("fc1", "fc2"), ("c_fc", "c_proj"), ("lin1", "lin2")):
        if scope.has(first, second):
            return chain(
                find_linear(scope.child(first)),
                find_activation(scope.attribute(*_ACTIVATION), gated=False),
                find_linear(scope.child(second)),
            )
    return None


def _mlp(scope: Scope | None) -> Part:
    part = None if scope is None else gated_mlp(scope) or plain_mlp(scope)
    if part is None:
        raise NotRecognised("its MLP has a structure not known here")
    return part


def decoder_block(scope: Scope) -> Part | None:
    """Pre-norm decoder with gated MLP; with Gemma 2 and 3's norms behind each half as well."""
    if not scope.has("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        return None
    attention = find_attention(scope.module, scope.child("self_attn"))
    mlp = _mlp(scope.child("mlp"))
    first = find_norm(scope.child("input_layernorm"))
    after_attention = find_norm(scope.child("post_attention_layernorm"))
    if not scope.has("pre_feedforward_layernorm"):
        return chain(around(first, attention), around(after_attention, mlp))
    before_mlp = find_norm(scope.child("pre_feedforward_layernorm"))
    after_mlp = find_norm(scope.child("post_feedforward_layernorm"))
    return chain(around(first, attention, after_attention), around(before_mlp, mlp, after_mlp))


def post_norm_block(scope: Scope) -> Part | None:
    """BERT, RoBERTa, MiniLM: norm(x + attention(x)), then norm(h + MLP(h))."""
    if not scope.has("attention.self", "attention.output.LayerNorm", "intermediate", "output"):
        return None
    attention = find_attention(
        scope.module, scope.child("attention.self"), scope.child("attention.output.dense")
    )
    return chain(
        around(attention),
        find_norm(scope.child("attention.output.LayerNorm")),
        around(_unwrapped_mlp(scope)),
        find_norm(scope.child("output.LayerNorm")),
    )


# norm 1, attention, its scale, norm 2, MLP, its scale
_PRE_NORM = (
    ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"),  # GPT-2, open_clip
    ("layer_norm1", "self_attn", "", "layer_norm2", "mlp", ""),  # CLIP, SigLIP
    ("layernorm_before", "attention", "", "layernorm_after", "mlp", ""),  # ViT
    ("norm1", "attention", "layer_scale1", "norm2", "mlp", "layer_scale2"),  # DINOv2
    ("norm1", "attn", "ls1", "norm2", "mlp", "ls2"),  # timm, DINOv2's own code
)


def pre_norm_block(scope: Scope) -> Part | None:
    """x + scale attention(norm(x)), then h + scale MLP(norm(h))."""
    for names in _PRE_NORM:
        if scope.has(names[0], names[1], names[3]):
            break
    else:
        return None
    norm1, attention, scale1, norm2, mlp, scale2 = names
    # Before version 5, transformers keeps ViT's projections one level down, and its MLP unwrapped.
    projections = scope.child(f"{attention}.attention", attention)
    output = scope.child(f"{attention}.output.dense")
    unwrapped = scope.has("intermediate", "output")
    feed_forward = _unwrapped_mlp(scope) if unwrapped else _mlp(scope.child(mlp))
    return chain(
        around(
            find_norm(scope.child(norm1)),
            find_attention(scope.module, projections, output),
            find_scale(scope.child(scale1)) if scale1 else None,
        ),
        around(
            find_norm(scope.child(norm2)),
            feed_forward,
            find_scale(scope.child(scale2)) if scale2 else None,
        ),
    )


def _unwrapped_mlp(scope: Scope) -> Chain:
    """The MLP of blocks that hold it as intermediate.dense and output.dense."""
    intermediate = scope.child("intermediate") or scope
    return chain(
        find_linear(scope.child("intermediate.dense")),
        find_activation(intermediate.attribute(*_ACTIVATION), gated=False),
        find_linear(scope.child("output.dense")),
    )
