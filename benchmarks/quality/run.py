"""Every merging method on one suite, over seeds; writes the result file.

    python benchmarks/quality/run.py vision --seeds 3          # what `make suite-vision` runs

Whatever a method leaves open (factor of the merged task vector, WUDI's rate, adaptation's distance,
rate and epochs and whether it begins at the best factor or at the published one, RegMean's
off-diagonal factor) is chosen on the validation split, adaptation's with seed 0 and
weight-initialised anchors, and serves all seeds and both initialisations. FDA with the published
settings of adaptation is run once, with that seed and those anchors. The test split decides
nothing. Every step is stored: a run that is cut off continues.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
OFF_DIAGONALS = (0.5, 0.9)
INITS = ("weights", "gaussian")
Unit = dict[str, Any]
"""What one merge gave: by task "scores", accuracies, and what was "right"; and "seconds"."""


class Runner:
    """Runs and stores the units of one suite."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.key = methods.fingerprint(suite)
        self.chosen: dict[str, Any] = {}
        self.directions: dict[str, LayerWeights] = {}

    def unit(
        self,
        name: str,
        settings: dict[str, Any],
        make: Callable[[], LayerWeights],
        split: str = "test",
    ) -> Unit:
        """Accuracies of a merge on one split, stored under its settings."""

        def work() -> Unit:
            begun = time.process_time()
            layers = make()
            seconds = time.process_time() - begun
            model = self.suite.assemble(layers)
            found = self.suite.outcomes(dict.fromkeys(self.suite.tasks, model), split)
            print(
                f"{name} {settings}: {split} {mean(found['scores']):.2f}, {seconds:.1f} s",
                flush=True,
            )
            return {**found, "seconds": round(seconds, 2)}

        where = stored.folder(self.suite.name) / "outcomes"
        key = {**settings, "suite": self.key, "split": split}
        return stored.values(where, name, key, work)

    def sweep_start(self, method: Any) -> Unit:
        """A starting point at its best settings."""
        grid = self.suite.grid
        rates = grid.wudi_rates if method == "wudi" else (None,)
        candidates, settings = {}, {}
        for scaling, lr in itertools.product(grid.scalings, rates):
            one = {"scaling": scaling} | ({"lr": lr} if lr else {})
            name = f"{scaling} {lr}"
            settings[name] = one
            candidates[name] = self.start(method, one, "validation")
        chosen = self.chosen[method] = settings[best(candidates)]
        return self.start(method, chosen)

    def start(self, method: Any, settings: dict[str, Any], split: str = "test") -> Unit:
        return self.unit(method, settings, lambda: self.begin(method, **settings), split)

    def begin(self, method: Any, scaling: float, **settings: Any) -> LayerWeights:
        """Layers of a starting point; its direction is computed once."""
        key = f"{method} {settings}"
        if key not in self.directions:
            self.directions[key] = methods.starting_point(self.suite, method, **settings)
        return methods.scaled(self.suite, self.directions[key], scaling)

    def anchors(self, init: str, seed: int) -> tuple[Sequence[Any], dict[str, Any]]:
        return methods.construct(self.suite, seed, init=init)

    def fda(
        self,
        start: str,
        anchors: Sequence[Any],
        source: dict[str, Any],
        settings: Mapping[str, Any],
        split: str = "test",
    ) -> Unit:
        """Adaptation from a start; ``source`` names the anchors.

        ``settings``: of ``fda_fast.adapt``, and "scaling", the start's factor.
        """
        begin = {**self.chosen.get(start, {}), "scaling": settings.get("scaling")}
        adapting = {key: value for key, value in settings.items() if key != "scaling"}

        def make() -> LayerWeights:
            more: dict[str, Any] = {}
            if start == "task_arithmetic":
                more["coefficient"] = begin["scaling"]
            elif start != "pretrained":
                more["start"] = self.begin(start, **begin)
            return methods.adapt(self.suite, anchors, **more, **adapting)

        key = {"start": start, "from": begin, "anchors": source, **adapting}
        return self.unit("fda", key, make, split)

    def tune_fda(self, start: str, anchors: Sequence[Any], source: dict[str, Any]) -> Any:
        """Adaptation settings with the best validation accuracy."""
        grid = self.suite.grid
        free = grid.weights if start == "pretrained" else grid.coefficients
        factors: list[float | None] = [None]
        if start != "pretrained":
            factors = [*{self.chosen[start]["scaling"]: 0, grid.published[start]["scaling"]: 0}]
        candidates, settings = {}, {}
        for scaling, distance, lr, epochs in itertools.product(factors, grid.distances, *free):
            name = f"{scaling} {distance} {lr} {epochs}"
            settings[name] = {"distance": distance, "lr": lr, "epochs": epochs}
            settings[name] |= {"scaling": scaling} if scaling else {}
            one = {**settings[name], "seed": 0}
            candidates[name] = self.fda(start, anchors, source, one, "validation")
        return settings[best(candidates)]

    def regmean(
        self,
        inputs: Sequence[Any],
        source: dict[str, Any],
        off_diagonal: float,
        split: str = "test",
    ) -> Unit:
        key = {"anchors": source, "off_diagonal": off_diagonal}
        return self.unit(
            "regmean", key, lambda: methods.regmean_of(self.suite, inputs, off_diagonal), split
        )

    def tune_regmean(self, inputs: Sequence[Any], source: dict[str, Any]) -> float:
        found = {str(f): self.regmean(inputs, source, f, "validation") for f in OFF_DIAGONALS}
        return float(best(found))


def best(candidates: Mapping[str, Unit]) -> str:
    """The name of the candidate with the highest average accuracy."""
    return max(candidates, key=lambda name: mean(candidates[name]["scores"]))


def run(
    runner: Runner, seeds: int, *, inits: Sequence[str] = INITS, bounds: bool = True
) -> list[dict[str, Any]]:
    """The rows of the result.

    Args:
        runner: of the suite.
        seeds: of construction and adaptation.
        inits: of the anchors.
        bounds: also with published settings, and on real activations.
    """
    suite = runner.suite
    rows: list[dict[str, Any]] = []

    def add(method: str, units: list[Unit], **more: Any) -> None:
        rows.append(
            {
                "method": method,
                "scores": {t: [u["scores"][t] for u in units] for t in suite.tasks},
                "right": {t: [u["right"][t] for u in units] for t in suite.tasks},
                "seconds": [u["seconds"] for u in units],
                **more,
            }
        )

    untouched = [methods.parameters(layer) for layer in suite.layers(suite.pretrained)]
    add("pretrained", [runner.unit("pretrained", {}, lambda: untouched)])
    add("individual experts", [{**suite.outcomes(suite.experts, "test"), "seconds": 0.0}])
    for method in ("task_arithmetic", "tsv", "wudi"):
        add(STARTS[method], [runner.sweep_start(method)], settings=runner.chosen[method])

    first, _ = runner.anchors("weights", 0)
    source = methods.settings_of(suite, 0)
    tuned = {start: runner.tune_fda(start, first, source) for start in STARTS}
    off_diagonal = runner.tune_regmean(first, source)
    for init in inits:
        made = {seed: runner.anchors(init, seed) for seed in range(seeds)}
        cost = [made[seed][1]["seconds"] for seed in made]
        sources = {seed: methods.settings_of(suite, seed, init=init) for seed in made}
        for start, label in STARTS.items():
            settings = tuned[start]
            units = [
                runner.fda(start, made[s][0], sources[s], {**settings, "seed": s}) for s in made
            ]
            add(f"FDA from {label}", units, start=label, init=init, which="tuned",
                settings=settings, construct_seconds=cost)  # fmt: skip
        units = [runner.regmean(made[s][0], sources[s], off_diagonal) for s in made]
        add("RegMean on anchors", units, init=init, settings={"off_diagonal": off_diagonal},
            construct_seconds=cost)  # fmt: skip
    if not bounds:
        return rows
    for start, label in STARTS.items():
        settings = suite.grid.published[start]
        unit = runner.fda(start, first, source, {**settings, "seed": 0})
        add(f"FDA from {label}", [unit], start=label, init="weights", which="published",
            settings=settings)  # fmt: skip
    with_data(runner, add)
    return rows


def with_data(runner: Runner, add: Callable[..., None]) -> None:
    """What the same adaptation reaches on real activations: a bound that needs data."""
    count = runner.suite.anchors
    real = methods.real_inputs(runner.suite, count)
    source = {"init": "real activations", "anchors": count, "tokens": runner.suite.tokens}
    for start, label in STARTS.items():
        settings = runner.tune_fda(start, real, source)
        unit = runner.fda(start, real, source, {**settings, "seed": 0})
        add(f"adapted on real activations from {label}", [unit], start=label, init="real",
            which="tuned", settings=settings)  # fmt: skip
    factor = runner.tune_regmean(real, source)
    add("RegMean on real activations", [runner.regmean(real, source, factor)], init="real",
        settings={"off_diagonal": factor})  # fmt: skip


def load_suite(name: str, seed: int = 0) -> Suite:
    """One of the suites by name, ``seed`` that of training; trains what is not stored."""
    if name.startswith("vision"):
        from vision import VisionSuite

        return VisionSuite(joint=name == "vision-joint", seed=seed)
    from text import TextSuite

    return TextSuite(seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("vision", "vision-joint", "text"))
    parser.add_argument("--seeds", type=int, default=3, help="of construction and adaptation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--inits", nargs="+", choices=INITS, default=INITS, help="of anchors")
    parser.add_argument("--no-bounds", action="store_true", help="no published settings, no data")
    parser.add_argument("--steps", type=int, help="of construction; default: the published 1200")
    parser.add_argument("--experts", type=int, default=0, help="seed of training")
    parser.add_argument("--label", help="recorded as quality-SUITE-LABEL")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    suite = load_suite(args.suite, args.experts)
    suite.steps = args.steps or suite.steps
    rows = run(Runner(suite), args.seeds, inits=args.inits, bounds=not args.no_bounds)
    payload = {
        "suite": suite.name,
        "tasks": {
            task: {split: suite.count(task, split) for split in ("train", "validation", "test")}
            for task in suite.tasks
        },
        "seeds": args.seeds,
        "command": shlex.join(["python", "benchmarks/quality/run.py", *sys.argv[1:]]),
        "construct": methods.settings_of(suite),
        "training": suite.record,
        "rows": rows,
    }
    name = "-".join(["quality", suite.name, *([args.label] if args.label else [])])
    print(f"recorded in {write_json(name, payload)}")


if __name__ == "__main__":
    main()
