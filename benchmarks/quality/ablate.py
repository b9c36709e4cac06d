"""Ablations on the vision suite: what each choice of the method is worth.

    python benchmarks/quality/ablate.py steps                  # one of them
    python benchmarks/quality/ablate.py --all                  # what `make ablations` runs

An ablation changes one thing of construction (or adaptation) and reports the average test accuracy
of FDA from the pretrained model (Eq. 5) and from Task Arithmetic (Eq. 6), with the adaptation
settings that the suite's own run chose on the validation split, and 100 steps but where steps are
what is varied. Needs the result file of `run.py vision`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any

import methods
import neighbours  # noqa: F401
import torch
from common import RESULTS, slug, write_json
from run import STARTS, Runner, load_suite
from suite import mean
from trajectory import KEPT

from fda_fast.machine import processor


@dataclass
class Variant:
    """One point of an ablation: its label, and what it changes."""

    label: str
    construct: dict[str, Any] = field(default_factory=dict)
    adapt: dict[str, Any] = field(default_factory=dict)
    at: int | None = None


STEPS = 100
"""Of construction where an ablation does not say otherwise."""
DISTANCES = ("cosine", "l2", "l1")
FP32 = {"precision": "fp32"}
ABLATIONS: dict[str, list[Variant]] = {
    "steps": [
        Variant(f"{init} {step if step > 1 else 0}", {"init": init, "steps": last}, at=step)
        for init, last in (("weights", 1200), ("gaussian", 1200))
        for step in KEPT
        if step <= last
    ],
    "anchors": [Variant(str(n), {"anchors": n}) for n in (8, 16, 32, 64, 128)],
    "tokens": [Variant(str(tokens), {"tokens": tokens}) for tokens in (1, 2, 5, 10)],
    "sigma": [
        Variant(f"{scale:g}", {"init": "gaussian", "scale": scale})
        for scale in (1e-4, 1e-2, 1.0, 10.0)
    ],
    "distance": [
        Variant(f"{built}, {adapted}", {"distance": built}, {"distance": adapted})
        for built in DISTANCES
        for adapted in DISTANCES
    ],
    "precision": [
        Variant("published loop, fp32", {"engine": "autograd"}, {"engine": "autograd"}),
        *(
            Variant(f"fda_fast, {name}", {"engine": "program", "precision": name},
                    {"engine": "program", "precision": name})
            for name in ("fp32", "tf32", "bf16")
        ),
    ],
    "optimiser": [
        Variant("published"),
        Variant("beta2 0.95", {"betas": [0.9, 0.95]}),
        Variant("beta2 0.99", {"betas": [0.9, 0.99]}),
        Variant("lr 0.003", {"lr": 3e-3}),
        Variant("lr 0.03", {"lr": 3e-2}),
        Variant("no decay", {"weight_decay": 0.0}),
    ],
    "patience": [
        Variant("none, 400 steps", {"steps": 400}),
        *(
            Variant(f"{patience}, {tolerance:g}",
                    {"steps": 400, "patience": patience, "tolerance": tolerance})
            for patience, tolerance in ((10, 3e-2), (20, 1e-2))
        ),
    ],
    "sign": [Variant("published code"), Variant("Eq. 1 as printed", {"sign": "paper"})],
}  # fmt: skip


class Ablation:
    """The suite, its starting points, and the settings its run chose."""

    def __init__(self) -> None:
        path = RESULTS / slug(processor()) / "quality-vision.json"
        if not path.exists():
            raise SystemExit(f"{path} is missing: python benchmarks/quality/run.py vision")
        result = json.loads(path.read_text())
        self.runner = Runner(load_suite("vision"))
        self.runner.suite.steps = STEPS
        by_label = {label: start for start, label in STARTS.items()}
        self.tuned = {
            by_label[row["start"]]: row["settings"]
            for row in result["rows"]
            if row.get("which") == "tuned" and row["init"] == "weights"
        }
        self.runner.sweep_start("task_arithmetic")

    def run(self, name: str, seeds: int) -> list[dict[str, Any]]:
        return [self._row(variant, seeds) for variant in ABLATIONS[name]]

    def _row(self, variant: Variant, seeds: int) -> dict[str, Any]:
        row: dict[str, Any] = {"label": variant.label, "construct": variant.construct,
                               "adapt": variant.adapt, "at": variant.at}  # fmt: skip
        found: dict[str, list[float]] = {k: [] for k in ("loss", "seconds", "steps", *STARTS)}
        for seed in range(seeds):
            anchors, record = methods.construct(
                self.runner.suite, seed, at=variant.at, **variant.construct
            )
            for key in ("loss", "seconds", "steps"):
                found[key].append(record[key])
            source = methods.settings_of(self.runner.suite, seed, **variant.construct)
            source["at"] = variant.at
            for start in ("pretrained", "task_arithmetic"):
                settings = {**self.tuned[start], **variant.adapt, "seed": seed}
                unit = self.runner.fda(start, anchors, source, settings)
                found[start].append(mean(unit["scores"]))
        return row | {key: values for key, values in found.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ABLATIONS))
    parser.add_argument("--all", action="store_true", help="every ablation")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    names = list(ABLATIONS) if args.all else args.names
    unknown = set(names) - ABLATIONS.keys()
    if unknown or not names:
        parser.error(f"name one of {', '.join(ABLATIONS)}, or --all")
    torch.set_num_threads(args.threads)
    ablation = Ablation()
    for name in names:
        rows = ablation.run(name, args.seeds)
        payload = {"ablation": name, "suite": "vision", "seeds": args.seeds,
                   "adapt": ablation.tuned, "rows": rows}  # fmt: skip
        print(f"recorded in {write_json(f'quality-ablate-{name}', payload)}", flush=True)


if __name__ == "__main__":
    main()
