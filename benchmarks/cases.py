"""The layers that steps are timed on, with random weights of the real shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One layer shape with the anchors the paper uses for it.

    Attributes:
        name: of the case.
        build: makes the pretrained layer, float32, eval mode.
        shape: of one task's anchors, [n, T, d] or [n, d].
        tasks: K, constructed together.
        published_grads: "both" if the published loop also accumulates gradients of the
            fine-tuned layer's weights (vision, NLU), "pretrained" if not (NLG).
        checked: anchors whose dL/dX is held against float64; None for all. Double backward of
            the largest case in float64 would take 69 GB with all of them.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tasks: int = 1
    published_grads: str = "both"
    checked: int | None = None


def bert(hidden: int, heads: int, inner: int) -> nn.Module:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(hidden_size=hidden, num_attention_heads=heads, intermediate_size=inner)
    config._attn_implementation = "sdpa"
    return BertLayer(config)


def roberta(hidden: int, heads: int, inner: int) -> nn.Module:
    from transformers import RobertaConfig
    from transformers.models.roberta.modeling_roberta import RobertaLayer

    config = RobertaConfig(hidden_size=hidden, num_attention_heads=heads, intermediate_size=inner)
    config._attn_implementation = "sdpa"
    return RobertaLayer(config)


def clip(hidden: int, heads: int, inner: int) -> nn.Module:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    config = CLIPVisionConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=inner
    )
    config._attn_implementation = "sdpa"
    return CLIPEncoderLayer(config)


def llama_mlp(hidden: int, inner: int) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=inner))


CASES = {
    case.name: case
    for case in [
        Case("minilm_layer", lambda: bert(384, 12, 1536), (64, 5, 384)),
        Case("roberta_base_layer", lambda: roberta(768, 12, 3072), (64, 5, 768)),
        Case("vit_b32_block", lambda: clip(768, 12, 3072), (64, 50, 768)),
        Case("swiglu_1024", lambda: llama_mlp(1024, 2816), (512, 1024), 1, "pretrained"),
        Case("minilm_layer_x4", lambda: bert(384, 12, 1536), (64, 5, 384), 4),
        Case("roberta_base_layer_x4", lambda: roberta(768, 12, 3072), (64, 5, 768), 4),
        Case("roberta_base_layer_x8", lambda: roberta(768, 12, 3072), (64, 5, 768), 8),
        Case("vit_l14_block", lambda: clip(1024, 16, 4096), (64, 257, 1024)),
        Case("llama2_13b_mlp", lambda: llama_mlp(5120, 13824), (8192, 5120), 1, "pretrained"),
        Case("llama_70b_mlp", lambda: llama_mlp(8192, 28672), (8192, 8192), 1, "pretrained", 2048),
    ]
}
CPU_CASES = [
    "minilm_layer",
    "roberta_base_layer",
    "vit_b32_block",
    "swiglu_1024",
    "minilm_layer_x4",
    "roberta_base_layer_x4",
]
GPU_CASES = [
    "llama2_13b_mlp",
    "vit_l14_block",
    "vit_b32_block",
    "roberta_base_layer",
    "roberta_base_layer_x8",
    "llama_70b_mlp",
]


def make(
    case: Case, ratio: float, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, list[nn.Module], Tensor]:
    """Pretrained layer, K fine-tuned ones with |tau|/|theta| = ``ratio``, anchors [K, n, (T,) d].

    Drawn on the device itself: the processor would take longer for the largest layers than the
    card for all that is measured. The same draws for every dtype: float64 holds exactly the
    float32 weights, so that it can serve as the oracle.
    """
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        pretrained = case.build().eval()
        for p in pretrained.parameters():
            if p.dim() == 1:  # biases start at 0 and norms at 1; trained ones do not stay there
                p.add_(0.02 * torch.randn_like(p))
        finetuned = []
        for _ in range(case.tasks):
            layer = copy.deepcopy(pretrained)
            for p in layer.parameters():
                step = torch.randn_like(p)
                p.add_(step * (ratio * p.norm() / step.norm()))
            finetuned.append(layer)
        anchors = 0.05 * torch.randn(case.tasks, *case.shape)
    place = [layer.to(dtype) for layer in (pretrained, *finetuned)]
    return place[0], place[1:], anchors.to(dtype)
