"""The paper's section 3 on the demo: spectrum, subspaces, updates and features, with real texts.

    python benchmarks/bench_analyses.py                       # merges first, as the demo does
    python benchmarks/bench_analyses.py --run demo-output/models/fda-pretrained-0
    python benchmarks/bench_analyses.py --page docs/demo.html   # the report's page as well

MiniLM and the four experts of the demo, its settings, seed 0; the real data are 64 validation texts
of each task, read by the task's expert. The middle and the last layer are looked at; anchors begin
at weight rows, as in the demo, and at Gaussian noise of sigma 0.01. Writes analyses.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write_json

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from assets import MINILM, fetch  # noqa: E402
from demo import ADAPT, CONSTRUCT, SCALING  # noqa: E402
from tasks import TASKS, load_task  # noqa: E402

import fda_fast  # noqa: E402
from fda_fast.job import Job  # noqa: E402
from fda_fast.pipeline import read_layer  # noqa: E402
from fda_fast.report import spectrum  # noqa: E402
from fda_fast.report.analyses import (  # noqa: E402
    analyse,
    choose_layers,
    compare,
    read_activations,
)
from fda_fast.report.page import page  # noqa: E402
from fda_fast.report.replay import milestones, replay  # noqa: E402
from fda_fast.report.results import Analyses, LayerAnalysis, TaskAnalysis  # noqa: E402
from fda_fast.report.run import Run  # noqa: E402
from fda_fast.report.texts import batches, load_model, load_tokenizer, put_expert  # noqa: E402


def write_texts(folder: Path) -> dict[str, Path]:
    """Validation texts of every task, one a line."""
    paths = {}
    for name in TASKS:
        paths[name] = folder / f"{name}.txt"
        lines = (" ".join(text.split()) for text in load_task(name).validation.texts)
        paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def save_real(job: Job, texts: dict[str, Path], folder: Path) -> None:
    """What every expert's layers take in on its texts."""
    assert job.base.directory is not None
    tokenizer = load_tokenizer(job.base.directory)
    for name, path in texts.items():
        model = load_model(job.base.directory)
        put_expert(model, job, name)
        inputs = batches(path.read_text(encoding="utf-8").splitlines(), tokenizer)
        found = fda_fast.collect_activations(model, inputs, count=64)
        fda_fast.save_activations(folder, name, found)


def from_noise(run: Run, job: Job, indices: list[int], real: Path) -> list[LayerAnalysis]:
    """The same analyses of anchors that begin at Gaussian noise."""
    construct = dataclasses.replace(job.settings.construct, init="gaussian", scale=0.01)
    settings = dataclasses.replace(job.settings, construct=construct)
    activations = read_activations(real, run)
    steps = {name: milestones(construct.steps) for name in job.experts}
    found = []
    for index in indices:
        inputs = read_layer(job, index)
        layer = LayerAnalysis(inputs.name)
        for name, by_step in replay(inputs, settings, list(job.experts), steps).items():
            analysis = TaskAnalysis({step: spectrum(x) for step, x in by_step.items()})
            compare(analysis, inputs, name, by_step, activations[name][inputs.name], job)
            layer.tasks[name] = analysis
        found.append(layer)
    return found


def as_rows(init: str, layers: list[LayerAnalysis]) -> list[dict[str, Any]]:
    """JSON values: one row for each layer, task and step."""
    rows = []
    for layer in layers:
        for task, analysis in layer.tasks.items():
            halves = analysis.overlap_of_data
            for step, found in analysis.spectra.items():
                overlap = analysis.overlaps[step]
                rows.append(
                    {
                        "init": init,
                        "layer": layer.layer,
                        "task": task,
                        "step": step,
                        "gini": found.gini,
                        "effective_rank": found.effective_rank,
                        "stable_rank": found.stable_rank,
                        "rank": overlap.ranks[0],
                        "similarity": overlap.similarity[0],
                        "chance": overlap.chance[0],
                        "similarity_of_halves": halves.similarity[0] if halves else None,
                        "energy": analysis.energy.get(step),
                        "energy_reverse": analysis.reverse.get(step),
                        "energy_of_task_vector": analysis.reference,
                        "drift": analysis.drift,
                    }
                )
    return rounded(rows)


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every quantity at the first and the last step: means, and in how many cases it rose."""
    found = []
    for init in dict.fromkeys(row["init"] for row in rows):
        for layer in dict.fromkeys(row["layer"] for row in rows):
            for key in ("gini", "effective_rank", "similarity", "energy"):
                pairs = []
                for task in dict.fromkeys(row["task"] for row in rows):
                    one = [
                        row
                        for row in rows
                        if (row["init"], row["layer"], row["task"]) == (init, layer, task)
                    ]
                    by_step = {row["step"]: row[key] for row in one}
                    pairs.append((by_step[min(by_step)], by_step[max(by_step)]))
                first, last = (statistics.fmean(values) for values in zip(*pairs, strict=True))
                found.append(
                    {
                        "init": init,
                        "layer": layer,
                        "what": key,
                        "first": first,
                        "last": last,
                        "rose": sum(b > a for a, b in pairs),
                        "of": len(pairs),
                    }
                )
    return rounded(found)


def bias_rows(start: str, found: Analyses) -> list[dict[str, Any]]:
    """Distances from the experts' features, of the start and of the merged model."""
    rows = []
    for model, by_task in found.bias.items():
        for task, values in by_task.items():
            for layer, one in zip(found.bias_layers, values, strict=True):
                row = {"start": start, "model": model, "task": task, "layer": layer}
                rows.append(row | dataclasses.asdict(one))
    return rounded(rows)


def from_arithmetic(
    run: Run, base: Path, experts: dict[str, Path], texts: dict[str, Path]
) -> Analyses:
    """Features of the merge from Task Arithmetic with the same anchors."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "fda-task_arithmetic-0"
        settings = {**CONSTRUCT, **ADAPT["task_arithmetic"]}
        settings["scaling"] = SCALING["task_arithmetic"]
        fda_fast.merge(
            base, experts, folder, start="task_arithmetic", anchors_from=run.anchors, **settings
        )
        merged = Run.open(folder)
        job = merged.job(base, experts, "cpu")
        try:
            return analyse(merged, job, indices=[], texts=texts)
        finally:
            job.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a merge of the demo that is there already")
    parser.add_argument("--page", type=Path, help="write the report's page here")
    options = parser.parse_args()
    base = fetch(MINILM)
    experts = {name: EXAMPLES / "adapters" / name for name in TASKS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run or Path(scratch) / "fda-pretrained-0"
        if options.run is None:
            settings = {**CONSTRUCT, **ADAPT["pretrained"]}
            fda_fast.merge(base, experts, folder, seed=0, keep_anchors=True, **settings)
        run = Run.open(folder)
        job = run.job(base, experts, "cpu")
        texts = write_texts(Path(scratch))
        real = Path(scratch) / "activations"
        save_real(job, texts, real)
        indices = choose_layers(run, None)
        found = analyse(run, job, indices=indices, texts=texts, activations=real)
        if options.page is not None:
            options.page.write_text(page(run, found), encoding="utf-8")
        rows = as_rows("weights", found.layers)
        rows += as_rows("gaussian", from_noise(run, job, indices, real))
        job.close()
        bias = bias_rows("pretrained", found)
        bias += bias_rows("task_arithmetic", from_arithmetic(run, base, experts, texts))
    settings = {"construct": job.settings.as_dict()["construct"], "texts_per_task": 64}
    payload = {
        "settings": settings,
        "claims": claims(rows),
        "rows": rows,
        "bias": bias,
    }
    print(f"written: {write_json('analyses', payload)}")
    for claim in payload["claims"]:
        print(*claim.values())


if __name__ == "__main__":
    main()
