"""Merges four experts of a sentence encoder by every method, scores them, draws the result.

    python examples/demo.py                 # what `make demo` runs; at most five minutes on 2 cores
    python examples/demo.py --seeds 3       # mean and spread over seeds
    python examples/demo.py --quick         # all of it in small, under a minute

The experts are LoRA adapters of all-MiniLM-L6-v2, each fine-tuned on one task with its own label
space (examples/train_experts.py made them). Merged models are scored on texts that no expert was
trained on, each task with the head of its expert. What a method leaves open (the factor of the
merged task vector, the epochs of adaptation) was chosen on the validation texts: --tune does it
again. The test texts decide nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from assets import MINILM, AssetError, fetch
from drawing import Row, as_record, markdown_table, picture, terminal_table
from peft import PeftModel
from rich.console import Console
from tasks import EXAMPLES, TASKS, Batches, accuracy, load_heads, load_task, load_tokenizer
from torch import nn
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

import fda_fast

LABELS = {
    "pretrained": "pretrained",
    "task_arithmetic": "Task Arithmetic",
    "tsv": "TSV-M",
    "wudi": "WUDI",
}
EXPERTS = "individual experts"
# Chosen on the validation texts, see --tune.
SCALING = {"task_arithmetic": 0.3, "tsv": 0.5, "wudi": 0.5}
CONSTRUCT = {"anchors": 32, "tokens": 8, "steps": 100}
ADAPT = {
    "pretrained": {"adapt_distance": "l2", "adapt_lr": 2e-4, "epochs": 10},
    "task_arithmetic": {"adapt_distance": "l2", "adapt_lr": 1e-2, "epochs": 10},
    "tsv": {"adapt_distance": "l2", "adapt_lr": 1e-2, "epochs": 3},
    "wudi": {"adapt_distance": "l2", "adapt_lr": 1e-2, "epochs": 6},
}
TEST_TEXTS = 400  # per task
QUICK = {"anchors": 8, "tokens": 4, "steps": 4, "epochs": 2}
QUICK_TEXTS = 32

console = Console(stderr=True)


class Demo:
    """Base, experts, held-out texts, and the folder where merged models go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.base = fetch(MINILM)
        self.adapters = {name: args.experts / name for name in TASKS}
        self.heads = load_heads(args.experts / "heads.safetensors")
        tokenizer = load_tokenizer()
        split = "validation" if args.tune else "test"
        self.texts = {
            name: Batches.of(getattr(load_task(name), split).first(args.texts), tokenizer)
            for name in TASKS
        }
        self.output: Path = args.output
        self.models = self.output / "models"
        self.quick: dict[str, Any] = QUICK if args.quick else {}
        if self.models.exists():
            shutil.rmtree(self.models)  # of an earlier run
        self.models.mkdir(parents=True)

    def score(self, encoder: nn.Module) -> dict[str, float]:
        """Accuracy on every task, with the heads of the tasks' experts."""
        return {n: accuracy(encoder, self.heads[n], texts) for n, texts in self.texts.items()}

    def score_folder(self, folder: Path) -> dict[str, float]:
        """Loads a checkpoint as its users would, and scores it."""
        return self.score(AutoModel.from_pretrained(folder, local_files_only=True))

    def score_experts(self) -> dict[str, float]:
        """Every expert on its own task; PEFT, not fda_fast, adds the adapters to the base."""
        scores = {}
        for name, adapter in self.adapters.items():
            base = AutoModel.from_pretrained(self.base, local_files_only=True)
            expert = PeftModel.from_pretrained(base, adapter).merge_and_unload()
            scores[name] = accuracy(expert, self.heads[name], self.texts[name])
        return scores

    def merge(self, name: str, **settings: Any) -> Path:
        """One merged checkpoint, by the public function; ``settings`` as the YAML has them."""
        folder = self.models / name
        fda_fast.merge(self.base, self.adapters, folder, **settings)
        return folder

    def starting_point(self, start: str, scaling: float) -> dict[str, float]:
        folder = self.merge(start, method=start, scaling=scaling)
        scores = self.score_folder(folder)
        shutil.rmtree(folder)
        return scores

    def fda(self, start: str, seed: int, anchors: Path | None, **changed: Any) -> Path:
        """FDA from a start; makes the anchors if there are none yet, and keeps them."""
        settings = {**CONSTRUCT, **ADAPT[start], **self.quick, **changed}
        if start != "pretrained":
            settings["scaling"] = SCALING[start]
        if anchors is None:
            settings["keep_anchors"] = True
        else:
            settings["anchors_from"] = anchors
        return self.merge(f"fda-{start}-{seed}", start=start, seed=seed, **settings)


@contextmanager
def stage(text: str) -> Iterator[None]:
    console.print(f"[bold]{text}[/bold]")
    begun = time.perf_counter()
    yield
    console.print(f"  {time.perf_counter() - begun:.1f} s")


def run(demo: Demo, seeds: int) -> list[Row]:
    """All rows of the table. The anchors of a seed are made once and serve all four starts."""
    rows = {LABELS["pretrained"]: Row(LABELS["pretrained"]), EXPERTS: Row(EXPERTS)}
    with stage("The pretrained encoder and the experts themselves"):
        rows[LABELS["pretrained"]].add(demo.score_folder(demo.base))
        rows[EXPERTS].add(demo.score_experts())
    for start, scaling in SCALING.items():
        with stage(f"{LABELS[start]}, factor {scaling}"):
            row = rows[LABELS[start]] = Row(LABELS[start])
            row.add(demo.starting_point(start, scaling))
    for label in LABELS.values():
        rows[f"FDA from {label}"] = Row(f"FDA from {label}", start=label)
    for seed in range(seeds):
        anchors = None
        for start, label in LABELS.items():
            with stage(f"FDA from {label}, seed {seed}"):
                folder = demo.fda(start, seed, anchors)
                anchors = anchors or folder / "anchors"
                rows[f"FDA from {label}"].add(demo.score_folder(folder))
    return list(rows.values())


def tune(demo: Demo) -> None:
    """Prints validation accuracy by factor of each method, and by FDA's epochs."""
    for start in SCALING:
        for scaling in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2):
            scores = demo.starting_point(start, scaling)
            print(start, scaling, _summary(scores), flush=True)
    anchors = None
    for start in LABELS:
        for epochs in (5, 10, 20, 40):
            folder = demo.fda(start, 0, anchors, epochs=epochs)
            print("fda", start, epochs, _summary(demo.score_folder(folder)), flush=True)
            if anchors is None:
                anchors = demo.models / "anchors"
                shutil.move(folder / "anchors", anchors)
            shutil.rmtree(folder)


def _summary(scores: dict[str, float]) -> str:
    cells = " ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())
    return f"{cells} average {100 * sum(scores.values()) / len(scores):.2f}"


def save(rows: list[Row], demo: Demo, args: argparse.Namespace, seconds: float) -> None:
    """demo.json, demo.md and demo.png in the output folder; the recorded copy if asked for."""
    payload = {
        "texts_per_task": args.texts,
        "seeds": args.seeds,
        "seconds": round(seconds, 1),
        "settings": {"scaling": SCALING, "construct": CONSTRUCT, "adapt": ADAPT},
        "rows": as_record(rows),
    }
    (demo.output / "demo.json").write_text(json.dumps(payload, indent=1) + "\n")
    (demo.output / "demo.md").write_text(markdown_table(rows))
    picture(rows, demo.output / "demo.png")
    if args.record:
        sys.path.insert(0, str(EXAMPLES.parent / "benchmarks"))
        from common import write_json

        print(f"recorded in {write_json('demo', payload)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test; numbers mean nothing")
    parser.add_argument("--seeds", type=int, default=1, help="FDA runs per start")
    parser.add_argument("--texts", type=int, default=TEST_TEXTS, help="held-out texts per task")
    parser.add_argument("--tune", action="store_true", help="validation texts, several settings")
    parser.add_argument("--record", action="store_true", help="also into benchmarks/results")
    parser.add_argument("--experts", type=Path, default=EXAMPLES / "adapters")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    if args.quick:
        args.texts = QUICK_TEXTS
    return args


def main() -> None:
    args = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with stage("Model, adapters and texts"):
        demo = Demo(args)
    if args.tune:
        tune(demo)
        return
    begun = time.perf_counter()
    rows = run(demo, args.seeds)
    seconds = time.perf_counter() - begun
    save(rows, demo, args, seconds)
    Console().print(terminal_table(rows))
    print(
        f"{args.texts} held-out texts per task, {seconds:.0f} s, {torch.get_num_threads()} threads."
        f"\nThe merged models are in {demo.models}: AutoModel.from_pretrained loads them."
        f"\nPicture: {demo.output / 'demo.png'}"
    )


if __name__ == "__main__":
    try:
        main()
    except AssetError as error:
        sys.exit(f"error: {error}")
