"""Tiny real checkpoints that several test files merge."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fda_fast.times import TIMES


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it, but how long a merge took."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != TIMES)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class TinyModels:
    """A two-layer BERT with a tokenizer, two fine-tunes of it and a LoRA adapter on it."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def experts(self) -> list[Path]:
        return [self.folder / name for name in ("movie", "news", "lora")]

    def copy(self, name: str, to: Path) -> Path:
        """A copy of one of the checkpoints that a test may damage."""
        shutil.copytree(self.folder / name, to)
        return to

    def config(self, folder: Path, **parameters: object) -> Path:
        """A YAML configuration of all experts in ``folder``."""
        small = {"anchors": 6, "tokens": 3, "steps": 8, "epochs": 5}
        content = {
            "merge_method": "fda",
            "base_model": str(self.base),
            "models": [{"model": str(path)} for path in self.experts],
            "parameters": {**small, **parameters},
        }
        path = folder / "merge.yaml"
        path.write_text(json.dumps(content))  # JSON is YAML
        return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    base = BertModel(config).eval()
    base.save_pretrained(folder / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    for name in ("movie", "news"):
        _finetuned(base).save_pretrained(folder / name)
    _adapter(BertModel.from_pretrained(folder / "base"), folder / "lora")
    return TinyModels(folder)


def _finetuned(base: torch.nn.Module) -> torch.nn.Module:
    """The base with low-rank changes of a tenth of every matrix, and small ones elsewhere."""
    from copy import deepcopy

    expert = deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            if parameter.dim() == 2:
                delta = torch.randn(parameter.shape[0], 4) @ torch.randn(4, parameter.shape[1])
                parameter += 0.1 * delta * parameter.norm() / delta.norm()
            else:
                parameter += 0.01 * torch.randn_like(parameter)
    return expert


def _adapter(model: torch.nn.Module, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still says "gradient checkpointing"
        adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
