"""Texts through a model: batches of token ids, and models that experts are put into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fda_fast.errors import InputError

if TYPE_CHECKING:
    from fda_fast.job import Job

COUNT = 64
"""Texts of a task that are read; the paper takes 64 images."""
LONGEST = 32
BATCH = 16


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, without empty ones.

    Raises:
        InputError: no such file, not UTF-8, or nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"texts {path}", expected="a UTF-8 text file", got=reason) from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"texts {path}", expected="one text a line", got="no text")
    return found


def batches(texts: list[str], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Texts as batches of token ids of one length, without padding.

    Texts are cut to a common length, and shorter ones left out: half of the texts reach it, or it
    is 32 tokens.

    Args:
        texts: at least one.
        tokenizer: of transformers.

    Returns:
        At most 64 texts, {"input_ids": [b, T], "attention_mask": [b, T]}.
    """
    cut = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
    lengths = [len(ids) for ids in cut]
    length = sorted(lengths)[len(lengths) // 2]
    kept = [text for text, there in zip(texts, lengths, strict=True) if there >= length][:COUNT]
    encoded = tokenizer(kept, truncation=True, max_length=length)["input_ids"]
    ids = torch.tensor(encoded)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)
    ]


def load_model(folder: Path) -> nn.Module:
    """The transformers model of a folder, in float32 and eval mode; nothing is downloaded."""
    from transformers import AutoModel
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, trust_remote_code=False
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval()


def load_tokenizer(*folders: Path) -> Any:
    """The tokenizer of the first folder that has one."""
    from transformers import AutoTokenizer

    reasons = []
    for folder in folders:
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            reasons.append(str(error).splitlines()[0])
    raise InputError("no tokenizer for the texts", got="; ".join(reasons))


@torch.no_grad()
def put(model: nn.Module, job: Job, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite a model's parameters with tensors named as in the job's base."""
    for name, parameter in model.named_parameters():
        there = _base_name(model, job, name)
        if there is not None and there in tensors:
            parameter.copy_(tensors[there])


def put_expert(model: nn.Module, job: Job, task: str) -> None:
    """Turn a copy of the base into one of its experts, embeddings included."""
    names = [_base_name(model, job, name) for name, _ in model.named_parameters()]
    put(model, job, job.experts[task].read([name for name in names if name is not None]))


def _base_name(model: nn.Module, job: Job, name: str) -> str | None:
    prefix = getattr(model, "base_model_prefix", "")
    for there in (name, f"{prefix}.{name}"):
        if there in job.base.names:
            return there
    return None
