"""Makes the experts that ship in examples/adapters: a LoRA adapter and a head for each task.

    nice python examples/train_experts.py                  # all four, into examples/adapters
    python examples/train_experts.py --tasks movie --method full --output /some/folder

Each expert is the pretrained encoder fine-tuned on one task. The embeddings stay frozen; LoRA
changes every linear layer of every block. A task whose files exist is left alone, so a run that
was cut off continues with the next task. Needs the peft package.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from assets import MINILM, AssetError, fetch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tasks import (
    EXAMPLES,
    MAX_TOKENS,
    TASKS,
    Batches,
    Split,
    Task,
    accuracy,
    features,
    load_task,
    load_tokenizer,
    pad,
)
from torch import nn
from transformers import AutoModel

# Every linear layer of a block, and none outside the blocks (the pooler is not used).
LINEAR = r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|.*\.dense)"
BATCH = 32
EVALUATED = 1000  # texts of the test split that are scored after training, for the record


def make_encoder(base: str | Path, method: str, rank: int) -> nn.Module:
    """The pretrained encoder with the trainable part that ``method`` names."""
    encoder = AutoModel.from_pretrained(base, local_files_only=True)
    if method == "full":
        encoder.embeddings.requires_grad_(False)
        return encoder
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LINEAR, bias="none"
    )
    return get_peft_model(encoder, config)


def train(task: Task, encoder: nn.Module, head: nn.Module, args: argparse.Namespace) -> None:
    """Adam on cross-entropy; the rate warms up over a tenth of the steps, then falls to zero."""
    tokenizer = load_tokenizer()
    texts, labels = task.train.texts[: args.samples], task.train.labels[: args.samples]
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    rate = args.lr or (1e-4 if args.method == "full" else 1e-3)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": rate}, {"params": head.parameters(), "lr": 2e-3}],
        weight_decay=0.01,
    )
    steps = math.ceil(len(encoded) / BATCH) * args.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.1 * steps), (steps - s) / (0.9 * steps))
    )
    order = random.Random(args.seed)
    encoder.train()
    done, started = 0, time.perf_counter()
    for epoch in range(args.epochs):
        rows = list(range(len(encoded)))
        order.shuffle(rows)
        # Batches of similar length waste no work on padding; their order is random again.
        rows = [
            chunk[i : i + BATCH]
            for start in range(0, len(rows), 32 * BATCH)
            for chunk in [sorted(rows[start : start + 32 * BATCH], key=lambda r: len(encoded[r]))]
            for i in range(0, len(chunk), BATCH)
        ]
        order.shuffle(rows)
        total = 0.0
        for batch in rows:
            ids, mask = pad([encoded[r] for r in batch], tokenizer.pad_token_id)
            target = torch.tensor([labels[r] for r in batch])
            loss = nn.functional.cross_entropy(head(features(encoder, ids, mask)), target)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
            done += 1
        print(
            f"  {task.name}: epoch {epoch + 1} of {args.epochs}, loss {total / len(rows):.3f}, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
    encoder.eval()


def make_expert(name: str, base: Path, args: argparse.Namespace) -> dict[str, float]:
    """Trains one expert, writes it, and returns its accuracies before and after."""
    torch.manual_seed(args.seed)
    task = load_task(name)
    encoder = make_encoder(base, args.method, args.rank)
    pretrained = AutoModel.from_pretrained(base, local_files_only=True)
    head = nn.Linear(encoder.config.hidden_size, len(task.classes))
    nn.init.zeros_(head.bias)
    train(task, encoder, head, args)
    folder = args.output / name
    if args.method == "full":
        encoder.save_pretrained(folder)
    else:
        halves = copy.deepcopy(encoder.peft_config["default"])
        halves.base_model_name_or_path = MINILM.spec
        halves.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        encoder.half().save_pretrained(folder)
        encoder.float()
        halves.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    tokenizer = load_tokenizer()
    scored = {
        "test": Batches.of(task.test.first(EVALUATED), tokenizer),
        "validation": Batches.of(task.validation, tokenizer),
        "train": Batches.of(Split(task.train.texts, task.train.labels).first(EVALUATED), tokenizer),
    }
    record = {f"expert_{k}": accuracy(encoder, head, b) for k, b in scored.items()}
    record["pretrained_test"] = accuracy(pretrained, head, scored["test"])
    _add_head(args.output / "heads.safetensors", name, head)
    return record


def _add_head(file: Path, name: str, head: nn.Linear) -> None:
    heads = load_file(file) if file.exists() else {}
    heads[f"{name}.weight"] = head.weight.detach().half()
    heads[f"{name}.bias"] = head.bias.detach().half()
    temporary = file.with_suffix(".part")
    save_file(heads, temporary)
    temporary.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA matrices")
    parser.add_argument("--samples", type=int, default=2000, help="training texts per task")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, help="default: 1e-3 for lora, 1e-4 for full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", type=Path, help="encoder to fine-tune; default: the MiniLM")
    parser.add_argument("--output", type=Path, default=EXAMPLES / "adapters")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    base = args.base or fetch(MINILM)
    log = args.output / "experts.json"
    records = json.loads(log.read_text()) if log.exists() else {}
    for name in args.tasks:
        if name in records:
            print(f"{name}: there already")
            continue
        print(f"{name}: {TASKS[name]}", flush=True)
        record = make_expert(name, base, args)
        records[name] = {key: round(value, 4) for key, value in record.items()}
        log.write_text(json.dumps(records, indent=2) + "\n")
        print("  " + ", ".join(f"{k} {v:.3f}" for k, v in record.items()), flush=True)


if __name__ == "__main__":
    try:
        main()
    except AssetError as error:
        sys.exit(f"error: {error}")
