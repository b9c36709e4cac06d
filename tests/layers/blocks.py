"""Real blocks of every recognised family, tiny, with random weights, in float32 or float64.

Hugging Face's RMSNorm and eager attention compute in float32 whatever the module's dtype. For
float64 oracles the norms are swapped for plain ones, and attention runs through sdpa, or for
Gemma 2's softcap, which sdpa lacks, through ``plain_attention``, registered with transformers.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
import transformers
from torch import nn

WIDTH = 24
HEADS = dict(num_attention_heads=4, num_hidden_layers=2)
DECODER = dict(**HEADS, num_key_value_heads=2, vocab_size=7, max_position_embeddings=32)
PLAIN = "fda_fast_test_plain"


def plain_attention(module, query, key, value, attention_mask, scaling, softcap=None, **_):
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + attention_mask, -1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


transformers.AttentionInterface.register(PLAIN, plain_attention)


class PlainRMSNorm(nn.Module):
    def __init__(self, weight, eps, offset):
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x):
        x = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * (self.offset + self.weight)


class OpenClipBlock(nn.Module):
    """The structure and arithmetic of open_clip's ResidualAttentionBlock."""

    def __init__(self, batch_first, quick=True, width=WIDTH):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=batch_first)
        self.ls_1 = nn.Identity()
        self.ln_2 = nn.LayerNorm(width)
        gelu = transformers.activations.QuickGELUActivation() if quick else nn.GELU()
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 40), gelu=gelu, c_proj=nn.Linear(40, width))
        )
        self.ls_2 = nn.Identity()

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        h = self.ln_1(q_x)
        x = q_x + self.ls_1(self.attn(h, h, h, need_weights=False, attn_mask=attn_mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def _decoder(width, module, name, **changes):
    modeling = getattr(getattr(transformers.models, module), f"modeling_{module}")
    kind = "Gemma3Text" if name == "Gemma3" else name
    sizes = dict(hidden_size=width, intermediate_size=2 * width)
    config = getattr(transformers, f"{kind}Config")(**{**DECODER, **sizes, **changes})
    config._attn_implementation = PLAIN if name == "Gemma2" else "sdpa"
    return getattr(modeling, f"{name}DecoderLayer")(config, 1)


def _encoder(width, module, layer, config, **changes):
    modeling = getattr(getattr(transformers.models, module), f"modeling_{module}")
    sizes = dict(hidden_size=width, intermediate_size=2 * width)
    config = getattr(transformers, config)(**{**HEADS, **sizes, **changes})
    config._attn_implementation = "sdpa"
    return getattr(modeling, layer)(config)


def _gpt2(width):
    config = transformers.GPT2Config(n_embd=width, n_head=4, n_layer=2, n_inner=40)
    config._attn_implementation = "sdpa"
    return transformers.models.gpt2.modeling_gpt2.GPT2Block(config, 0)


def _gemma3(width, layer_type):
    types = ["full_attention", layer_type]
    changes = dict(head_dim=width // 4 + 2, layer_types=types, sliding_window=3)
    return _decoder(width, "gemma3", "Gemma3", **changes)


def _gemma2(width):
    changes = dict(head_dim=width // 4 + 2, attn_logit_softcapping=2.0)
    return _decoder(width, "gemma2", "Gemma2", **changes)


BLOCKS = {
    "llama": lambda w: _decoder(w, "llama", "Llama"),
    "llama-bias": lambda w: _decoder(w, "llama", "Llama", attention_bias=True, mlp_bias=True),
    "llama-mlp": lambda w: _decoder(w, "llama", "Llama").mlp,
    "mistral": lambda w: _decoder(w, "mistral", "Mistral", sliding_window=3),
    "qwen2": lambda w: _decoder(w, "qwen2", "Qwen2"),
    "qwen3": lambda w: _decoder(w, "qwen3", "Qwen3", head_dim=w // 4 + 2),
    # fused qkv and gate-up projections
    "phi3": lambda w: _decoder(w, "phi3", "Phi3", pad_token_id=0),
    # LayerNorm, biases and a plain MLP in a decoder
    "starcoder2": lambda w: _decoder(w, "starcoder2", "Starcoder2"),
    "gemma2": _gemma2,
    "gemma2-mlp": lambda w: _gemma2(w).mlp,
    "gemma3-local": lambda w: _gemma3(w, "sliding_attention"),
    "gemma3-global": lambda w: _gemma3(w, "full_attention"),
    "bert": lambda w: _encoder(w, "bert", "BertLayer", "BertConfig"),
    "roberta": lambda w: _encoder(w, "roberta", "RobertaLayer", "RobertaConfig"),
    "gpt2": _gpt2,
    "vit": lambda w: _encoder(w, "vit", "ViTLayer", "ViTConfig"),
    "clip": lambda w: _encoder(w, "clip", "CLIPEncoderLayer", "CLIPVisionConfig"),
    "clip-text": lambda w: _encoder(w, "clip", "CLIPEncoderLayer", "CLIPTextConfig"),
    "dinov2": lambda w: _encoder(w, "dinov2", "Dinov2Layer", "Dinov2Config", layerscale_value=0.7),
    "dinov2-swiglu": lambda w: _encoder(
        w, "dinov2", "Dinov2Layer", "Dinov2Config", use_swiglu_ffn=True, mlp_ratio=2
    ),
    "siglip": lambda w: _encoder(w, "siglip", "SiglipEncoderLayer", "SiglipVisionConfig"),
    "open_clip": lambda w: OpenClipBlock(batch_first=True, width=w),
    "open_clip-sequence-first": lambda w: OpenClipBlock(False, quick=False, width=w),
}


def _plain_norms(module):
    """Every RMSNorm below replaced by one that computes in the dtype of its input."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("RMSNorm"):
            eps = getattr(child, "variance_epsilon", None) or child.eps
            offset = 1.0 if "Gemma" in type(child).__name__ else 0.0
            setattr(module, name, PlainRMSNorm(child.weight, eps, offset))
        else:
            _plain_norms(child)


def make_blocks(name, tasks, ratio, dtype=torch.float64, seed=0, width=WIDTH):
    """A pretrained block and fine-tuned ones with |tau| = ratio |theta| for each tensor."""
    generator = torch.Generator().manual_seed(seed)
    layer = BLOCKS[name](width).double().eval()

    def noise(p):
        return torch.randn(p.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for p in layer.parameters():
            if p.dim() == 2:
                p.copy_(noise(p) * p.shape[1] ** -0.5)
            else:
                p.add_(0.3 * noise(p))
        finetuned = [copy.deepcopy(layer) for _ in range(tasks)]
        for tuned in finetuned:
            for p in tuned.parameters():
                direction = noise(p)
                p.add_(direction * (ratio * p.norm() / direction.norm()))
    layers = [layer.to(dtype), *(tuned.to(dtype) for tuned in finetuned)]
    if dtype == torch.float64:
        for one in layers:
            _plain_norms(one)
    return layers[0], layers[1:]


def in_float64(layer):
    """The same layer, with the same weights, computing in float64 throughout."""
    wide = copy.deepcopy(layer).double()
    _plain_norms(wide)
    return wide


def make_anchors(tasks, anchors, tokens, dtype=torch.float64, seed=1, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    shape = (tasks, anchors, tokens, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
