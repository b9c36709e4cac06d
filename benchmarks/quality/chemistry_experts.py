"""Every method on the published chemistry BERT and its two published full fine-tunes.

    python benchmarks/quality/chemistry_experts.py --seeds 3

No labelled reactions are in any package, so there is no accuracy: merged models are compared with
each expert, by the cosine of their reaction fingerprints and, for the expert that was published
with a head, by how often head and merged encoder name the class that the expert names. Nothing is
tuned: factors and adaptation settings are those of examples/chemistry.py, for all starts alike.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import neighbours  # noqa: F401
import torch
from assets import RXNFP, fetch
from chemistry import (
    ADAPT,
    EXPERTS,
    REACTIONS,
    SCALING,
    Comparison,
    fingerprints,
    load_published,
)
from common import write_json
from torch import Tensor
from transformers import BertModel
from transformers.utils import logging as transformers_logging

import fda_fast

CONSTRUCT: dict[str, Any] = {"anchors": 32, "tokens": 5, "steps": 40}
FACTORS = {"task_arithmetic": SCALING, "tsv": 1.0, "wudi": 1.0}
STARTS = {"task_arithmetic": "Task Arithmetic", "tsv": "TSV-M", "wudi": "WUDI"}


class Classes:
    """The classes that the expert with a head names, and any encoder's under the same head."""

    def __init__(self, compare: Comparison) -> None:
        self.compare = compare
        file = fetch(RXNFP) / EXPERTS["schneider"] / "pytorch_model.bin"
        state = torch.load(file, map_location="cpu", weights_only=True)
        parts = ("bert.pooler.dense", "classifier")
        self.head = [(state[f"{part}.weight"], state[f"{part}.bias"]) for part in parts]
        self.expert = self.of(load_published(EXPERTS["schneider"]))

    def of(self, model: BertModel) -> Tensor:
        """Class numbers [reactions]; pooler and classifier are the expert's."""
        first = fingerprints(model, self.compare.ids, self.compare.mask)
        (pooler, pooler_bias), (weight, bias) = self.head
        pooled = torch.tanh(torch.nn.functional.linear(first, pooler, pooler_bias))
        return torch.nn.functional.linear(pooled, weight, bias).argmax(1)

    def agreement(self, model: BertModel) -> float:
        return (self.of(model) == self.expert).float().mean().item()


def run(seeds: int, construct: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows (method, scores by seed) of all methods."""
    folder = fetch(RXNFP)
    base = folder / "bert_pretrained"
    experts = {task: folder / name for task, name in EXPERTS.items()}
    compare = Comparison()
    classes = Classes(compare)
    rows: dict[str, dict[str, Any]] = {}

    def add(label: str, model: BertModel, seconds: float, **more: Any) -> None:
        row = rows.setdefault(label, {"method": label, "scores": {}, "seconds": [], **more})
        scores = {**compare.of(model), "agreement": classes.agreement(model)}
        for key, value in scores.items():
            row["scores"].setdefault(key, []).append(value)
        row["seconds"].append(round(seconds, 1))
        print(label, {key: round(value, 4) for key, value in scores.items()}, flush=True)

    add("pretrained", load_published("bert_pretrained"), 0.0)
    for task, name in EXPERTS.items():
        add(f"expert {task}", load_published(name), 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        anchors = output / "anchors"

        def merge(label: str, more: dict[str, Any] | None = None, **settings: Any) -> None:
            begun = time.process_time()
            where = output / "merged"
            fda_fast.merge(base, experts, where, **settings)
            model = BertModel.from_pretrained(where, local_files_only=True)
            add(label, model, time.process_time() - begun, **(more or {}))
            if settings.get("keep_anchors"):
                shutil.move(where / "anchors", anchors)
            shutil.rmtree(where)

        for method, label in STARTS.items():
            merge(label, method=method, scaling=FACTORS[method])
        for init, seed in itertools.product(("weights", "gaussian"), range(seeds)):
            made = {"seed": seed, "init": init, **construct}
            suffix = " (Gauss)" if init == "gaussian" else ""
            row = {"start": "pretrained", "init": init}
            merge(f"FDA from pretrained{suffix}", row, keep_anchors=True,
                  **ADAPT["pretrained"], **made)  # fmt: skip
            for start, label in STARTS.items():
                row = {"start": label, "init": init}
                merge(f"FDA from {label}{suffix}", row, start=start, scaling=FACTORS[start],
                      anchors_from=anchors, **ADAPT["task_arithmetic"], **made)  # fmt: skip
            shutil.rmtree(anchors)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows = run(args.seeds, CONSTRUCT)
    payload = {
        "suite": "chemistry",
        "seeds": args.seeds,
        "reactions": len(REACTIONS),
        "construct": CONSTRUCT,
        "adapt": ADAPT,
        "scaling": FACTORS,
        "rows": rows,
    }
    print(f"recorded in {write_json('quality-chemistry', payload)}")


if __name__ == "__main__":
    main()
