"""Every merging method on one suite, over seeds; writes the result file.

    python benchmarks/quality/run.py vision --seeds 3          # what `make suite-vision` runs

Whatever a method leaves open (factor of the merged task vector, WUDI's rate, adaptation's distance,
rate and epochs, RegMean's off-diagonal factor) is chosen on the validation split, adaptation's with
seed 0 and weight-initialised anchors, and serves all seeds and both initialisations. FDA is also
reported with the published settings. The test split decides nothing. Every step is stored: a run
that is cut off continues.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import methods
import neighbours  # noqa: F401
import stored
import torch
from common import write_json
from methods import LayerWeights
from suite import Suite, mean

STARTS = {
    "pretrained": "pretrained",
    "task_arithmetic": "Task Arithmetic",
    "tsv": "TSV-M",
    "wudi": "WUDI",
}
SCALINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)
WUDI_RATES = (1e-5, 1e-4, 1e-3)
OFF_DIAGONALS = (0.5, 0.9, 1.0)
PUBLISHED: dict[str, dict[str, Any]] = {
    "pretrained": {"distance": "cosine", "lr": 1e-5, "epochs": 100, "batch_size": 128},
    "task_arithmetic": {"distance": "cosine", "lr": 1e-2, "epochs": 100, "batch_size": 128},
    "tsv": {"distance": "cosine", "lr": 1e-2, "epochs": 100, "batch_size": 128},
    "wudi": {"distance": "cosine", "lr": 1e-2, "epochs": 25, "batch_size": 512},
}
"""Adaptation of the paper's ViTs, appendix C.3."""
RATES = {"pretrained": (1e-5, 1e-4, 3e-4, 1e-3), "coefficients": (1e-3, 1e-2)}
EPOCHS = {"pretrained": (25, 100), "coefficients": (5, 25, 100)}
DISTANCES = ("cosine", "l2")

Unit = dict[str, Any]
"""What one merge gave: "validation" and "test" accuracies by task, and "seconds"."""


class Runner:
    """Runs and stores the units of one suite."""

    def __init__(self, suite: Suite, *, construct: dict[str, Any] | None = None) -> None:
        self.suite = suite
        self.construct = construct or {}
        self.key = methods.fingerprint(suite)
        self.starts: dict[str, LayerWeights] = {}
        self.chosen: dict[str, Any] = {}

    def unit(self, name: str, settings: dict[str, Any], make: Callable[[], LayerWeights]) -> Unit:
        """Scores of a merge, stored under its settings."""

        def work() -> Unit:
            begun = time.process_time()
            layers = make()
            seconds = time.process_time() - begun
            found = {**methods.evaluate(self.suite, layers), "seconds": round(seconds, 2)}
            print(
                f"{name} {settings}: validation {mean(found['validation']):.2f} "
                f"test {mean(found['test']):.2f} in {seconds:.1f} s",
                flush=True,
            )
            return found

        where = stored.folder(self.suite.name) / "scores"
        return stored.values(where, name, {**settings, "suite": self.key}, work)

    def sweep_start(self, method: Any) -> Unit:
        """A starting point at its best settings; keeps its layers for FDA."""
        rates = WUDI_RATES if method == "wudi" else (None,)
        candidates, settings = {}, {}
        for scaling, lr in itertools.product(SCALINGS, rates):
            one = {"scaling": scaling} | ({"lr": lr} if lr else {})
            name = f"{scaling} {lr}"
            settings[name] = one
            candidates[name] = self.unit(
                method, one, lambda one=one: methods.starting_point(self.suite, method, **one)
            )
        chosen = methods.best(candidates)
        self.chosen[method] = settings[chosen]
        self.starts[method] = methods.starting_point(self.suite, method, **settings[chosen])
        return candidates[chosen]

    def anchors(self, init: str, seed: int) -> tuple[Sequence[Any], dict[str, Any]]:
        return methods.construct(self.suite, seed, **{**self.construct, "init": init})

    def fda(
        self, start: str, anchors: Sequence[Any], source: dict[str, Any], settings: dict[str, Any]
    ) -> Unit:
        """Adaptation from a start; ``source`` names the anchors."""
        more: dict[str, Any] = {}
        if start == "task_arithmetic":
            more["coefficient"] = self.chosen[start]["scaling"]
        elif start != "pretrained":
            more["start"] = self.starts[start]
        key = {"start": start, "from": self.chosen.get(start), "anchors": source, **settings}
        return self.unit("fda", key, lambda: methods.adapt(self.suite, anchors, **more, **settings))

    def tune_fda(self, start: str, anchors: Sequence[Any], source: dict[str, Any]) -> Any:
        """Adaptation settings with the best validation accuracy."""
        mode = "pretrained" if start == "pretrained" else "coefficients"
        candidates, settings = {}, {}
        for distance, lr, epochs in itertools.product(DISTANCES, RATES[mode], EPOCHS[mode]):
            name = f"{distance} {lr} {epochs}"
            settings[name] = {"distance": distance, "lr": lr, "epochs": epochs}
            candidates[name] = self.fda(start, anchors, source, {**settings[name], "seed": 0})
        return settings[methods.best(candidates)]

    def regmean(self, inputs: Sequence[Any], source: dict[str, Any], off_diagonal: float) -> Unit:
        key = {"anchors": source, "off_diagonal": off_diagonal}
        return self.unit(
            "regmean", key, lambda: methods.regmean_of(self.suite, inputs, off_diagonal)
        )

    def tune_regmean(self, inputs: Sequence[Any], source: dict[str, Any]) -> float:
        found = {str(f): self.regmean(inputs, source, f) for f in OFF_DIAGONALS}
        return float(methods.best(found))


def run(runner: Runner, seeds: int) -> list[dict[str, Any]]:
    """All rows of the result."""
    suite = runner.suite
    rows: list[dict[str, Any]] = []

    def add(method: str, units: list[Unit], **more: Any) -> None:
        rows.append(
            {
                "method": method,
                "test": {t: [u["test"][t] for u in units] for t in suite.tasks},
                "validation": {t: [u["validation"][t] for u in units] for t in suite.tasks},
                "seconds": [u["seconds"] for u in units],
                **more,
            }
        )

    untouched = [methods.parameters(layer) for layer in suite.layers(suite.pretrained)]
    add("pretrained", [runner.unit("pretrained", {}, lambda: untouched)])
    experts = {split: suite.score_experts(split) for split in ("validation", "test")}
    add("individual experts", [{**experts, "seconds": 0.0}])
    for method in ("task_arithmetic", "tsv", "wudi"):
        add(STARTS[method], [runner.sweep_start(method)], settings=runner.chosen[method])

    first, _ = runner.anchors("weights", 0)
    source = {**runner.construct, "init": "weights", "seed": 0}
    tuned = {start: runner.tune_fda(start, first, source) for start in STARTS}
    off_diagonal = runner.tune_regmean(first, source)
    for init in ("weights", "gaussian"):
        made = {seed: runner.anchors(init, seed) for seed in range(seeds)}
        cost = [made[seed][1]["seconds"] for seed in made]
        sources = {seed: {**runner.construct, "init": init, "seed": seed} for seed in made}
        for start, label in STARTS.items():
            for which, settings in (("tuned", tuned[start]), ("published", PUBLISHED[start])):
                units = [
                    runner.fda(start, made[s][0], sources[s], {**settings, "seed": s}) for s in made
                ]
                add(f"FDA from {label}", units, start=label, init=init, which=which,
                    settings=settings, construct_seconds=cost)  # fmt: skip
        units = [runner.regmean(made[s][0], sources[s], off_diagonal) for s in made]
        add("RegMean on anchors", units, init=init, settings={"off_diagonal": off_diagonal},
            construct_seconds=cost)  # fmt: skip
    with_data(runner, add)
    return rows


def with_data(runner: Runner, add: Callable[..., None]) -> None:
    """What the same adaptation reaches on real activations: a bound that needs data."""
    count = runner.construct.get("anchors", methods.CONSTRUCT["anchors"])
    real = methods.real_inputs(runner.suite, count)
    source = {"init": "real activations", "anchors": count}
    for start, label in STARTS.items():
        settings = runner.tune_fda(start, real, source)
        unit = runner.fda(start, real, source, {**settings, "seed": 0})
        add(f"adapted on real activations from {label}", [unit], start=label, init="real",
            which="tuned", settings=settings)  # fmt: skip
    factor = runner.tune_regmean(real, source)
    add("RegMean on real activations", [runner.regmean(real, source, factor)], init="real",
        settings={"off_diagonal": factor})  # fmt: skip


def load_suite(name: str) -> Suite:
    """One of the suites by name; trains what is not stored."""
    if name == "vision":
        from vision import VisionSuite

        return VisionSuite()
    from text import TextSuite

    return TextSuite()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("vision", "text"))
    parser.add_argument("--seeds", type=int, default=3, help="of construction and adaptation")
    parser.add_argument("--steps", type=int, help="of construction; default: the published 1200")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    suite = load_suite(args.suite)
    runner = Runner(suite, construct={"steps": args.steps} if args.steps else None)
    rows = run(runner, args.seeds)
    payload = {
        "suite": suite.name,
        "tasks": suite.tasks,
        "seeds": args.seeds,
        "construct": {**methods.CONSTRUCT, "tokens": suite.tokens, **runner.construct},
        "training": suite.record,
        "rows": rows,
    }
    print(f"recorded in {write_json(f'quality-{suite.name}', payload)}")


if __name__ == "__main__":
    main()
