"""Tiny real models of every family, saved by transformers itself, and fine-tunes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 20, "pad_token_id": 0}
LLAMA = {**SIZES, "vocab_size": 40, "num_key_value_heads": 2, "pad_token_id": 0}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}


def _clip() -> hf.CLIPModel:
    text = {**TEXT, "projection_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**IMAGE, "projection_dim": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def _gpt2() -> hf.GPT2LMHeadModel:
    sizes = {"n_positions": 20, "n_embd": 16, "n_layer": 3, "n_head": 4}
    config = hf.GPT2Config(vocab_size=40, bos_token_id=1, eos_token_id=2, **sizes)
    return hf.GPT2LMHeadModel(config)


FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)),
    "clip": _clip,
    "gpt2": _gpt2,
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(tie_word_embeddings=True, **LLAMA)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(head_dim=8, **LLAMA)),
}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny model, made at first use. Do not write into it."""
    root = tmp_path_factory.mktemp("families")

    def directory(name: str) -> Path:
        path = root / name
        if not path.exists():
            torch.manual_seed(7)
            FAMILIES[name]().save_pretrained(path)
        return path

    return directory


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory with one safetensors file."""
    return load_file(path / "model.safetensors")


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    **config: object,
) -> Path:
    """A copy of a model directory with its tensors passed through ``change``."""
    target.mkdir(parents=True)
    content = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    if change is None:
        shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
    else:
        tensors = {n: t.contiguous().clone() for n, t in change(tensors_of(source)).items()}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def finetune(tensors: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """The tensors moved by 1 %: what training would do to all of them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + 0.01 * torch.randn(t.shape, generator=generator).to(t.dtype)
        if t.is_floating_point()
        else t
        for name, t in tensors.items()
    }


@pytest.fixture
def expert(tmp_path: Path) -> Callable[..., Path]:
    """Make a fine-tune of a directory: ``expert(base, change=..., name=..., **config)``."""

    def make(base: Path, change: Callable = finetune, name: str = "expert", **config) -> Path:
        return rewrite(base, tmp_path / name, change, **config)

    return make
