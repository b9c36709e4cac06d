"""What benchmarks/report.py writes of the suites into README.md and docs/evidence.md."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from tables import (
    averages,
    claims,
    find,
    from_demo,
    gains,
    markdown,
    method_table,
    spread,
    unpack,
)

Result = dict[str, Any]


def methods(result: Result, where: str) -> str:
    """Every method on a suite, with the settings chosen on its validation split."""
    made = result["construct"]
    note = (
        f"Held-out accuracy in % of one merged model, {len(result['tasks'])} full fine-tunes; gain "
        "over its starting point in points; FDA and RegMean rows: mean and standard deviation over "
        f"{result['seeds']} seeds. {made['anchors']} anchors of {made['tokens']} tokens a task and "
        f"layer, {made['steps']} steps. Seconds of one processor core, construction + adaptation. "
        f"`{result['command']}`. ({where})"
    )
    return f"{markdown(*method_table(result))}\n\n{note}"


def published(result: Result, where: str) -> str:
    """FDA with the paper's adaptation settings; nothing if the run left them out."""
    if not any(row.get("which") == "published" for row in result["rows"]):
        return ""
    table = markdown(*method_table(result, which="published"))
    return f"{table}\n\nAdaptation as published (appendix C.3), one seed. ({where})"


def verdicts(result: Result, where: str) -> str:
    """The paper's claims on a suite."""
    table = markdown(["claim", "anchors", "points", "on this suite"], claims(result), left=2)
    note = (
        'Points of average accuracy over seeds. "No difference": within twice the error, which '
        f"joins the seeds' and the test set's. ({where})"
    )
    return f"{table}\n\n{note}"


def ablation(result: Result, where: str) -> str:
    """One ablation, variant by variant."""
    rows = [
        [
            row["label"],
            spread(row["pretrained"]),
            spread(row["task_arithmetic"]),
            f"{statistics.fmean(row['loss']):.3f}",
            f"{statistics.fmean(row['steps']):.0f}",
            f"{statistics.fmean(row['seconds']):.0f}",
        ]
        for row in result["rows"]
    ]
    head = [result["ablation"], "from pretrained, %", "from Task Arithmetic, %", "1 - cosine",
            "steps", "seconds"]  # fmt: skip
    note = f"`python benchmarks/quality/ablate.py {result['ablation']}`, {result['seeds']} seed(s)."
    return f"{markdown(head, rows)}\n\n{note} ({where})"


SUITES = {
    "quality-vision-joint": "images, heads trained along",
    "quality-vision": "images, heads fitted before",
    "quality-text": "texts",
    "demo": "texts, LoRA",
}


def summary(suites: dict[str, Result], where: str) -> str:
    """Average accuracy of every method on every suite, FDA's with its gain over the start."""
    found = {name: from_demo(r) if name == "demo" else r for name, r in suites.items()}
    starts = ("pretrained", "Task Arithmetic", "TSV-M", "WUDI")
    rows = []
    for method in ("individual experts", *starts):
        cells = [spread(averages(find(result, method))) for result in found.values()]
        rows.append([method, *cells])
    for start in starts:
        cells = []
        for result in found.values():
            row = find(result, f"FDA from {start}", init="weights", which="tuned")
            cells.append(
                f"{statistics.fmean(averages(row)):.1f} ({spread(gains(result, row), '+')})"
            )
        rows.append([f"FDA from {start}", *cells])
    sizes = [f"{SUITES[name]}, {len(result['tasks'])} tasks" for name, result in found.items()]
    seeds = {result["seeds"] for result in found.values()}
    note = (
        "Held-out accuracy in % of one merged model, averaged over the tasks; in brackets the gain "
        f"over its start, mean and standard deviation over {' or '.join(map(str, sorted(seeds)))} "
        "seeds. Full fine-tunes but for the last column. Every factor, rate and number of epochs "
        f"was chosen on validation splits. ({where})"
    )
    return f"{markdown(['average accuracy, %', *sizes], rows)}\n\n{note}"


REPEATED = {
    "quality-vision-joint": "as above",
    "quality-vision-joint-again": "made again from nothing",
    "quality-vision-joint-experts1": "pretrained and fine-tuned with seed 1",
}


def repeated(found: dict[str, Result], where: str) -> str:
    """Methods of one suite whose models were trained again: averages, and their ranking."""
    methods = [
        row
        for row in next(iter(found.values()))["rows"]
        if row.get("init", "weights") == "weights" and row.get("which", "tuned") == "tuned"
    ]
    values = {
        name: [
            averages(find(result, row["method"], **{k: row[k] for k in ("init",) if k in row}))
            for row in methods
        ]
        for name, result in found.items()
    }
    rows = [
        [row["method"], *(spread(columns[i]) for columns in values.values())]
        for i, row in enumerate(methods)
    ]
    means = [[statistics.fmean(v) for v in columns] for columns in values.values()]
    pairs = list(itertools.combinations(range(len(methods)), 2))
    same = [sum((a[i] < a[j]) == (means[0][i] < means[0][j]) for i, j in pairs) for a in means]
    rows.append(
        [
            "pairs of methods in the order of the first column, of " + str(len(pairs)),
            *map(str, same),
        ]
    )
    one = next(iter(found.values()))
    agreeing = [_answered_alike(one, other) for other in found.values()]
    rows.append(["test examples answered as by the first seed of the first column, %", *agreeing])
    head = ["average accuracy, %", *(REPEATED[name] for name in found)]
    commands = "; ".join(f"`{result['command']}`" for result in found.values())
    return f"{markdown(head, rows)}\n\n{commands}. ({where})"


def _answered_alike(one: Result, other: Result) -> str:
    """Share of equal outcomes over all methods; nothing if the experts are other ones."""
    hashes = [[e["sha256"] for e in r["training"]["experts"].values()] for r in (one, other)]
    if hashes[0] != hashes[1]:
        return ""
    same = []
    for row in other["rows"]:
        first = find(one, row["method"], **{k: row[k] for k in ("init", "which") if k in row})
        for task, sizes in other["tasks"].items():
            a, b = (unpack(r["right"][task][0], sizes["test"]) for r in (first, row))
            same.extend(a == b)
    return f"{100 * statistics.fmean(map(float, same)):.2f}"


def demo_verdicts(result: Result, where: str) -> str:
    """The paper's claims on the demo's experts."""
    return verdicts(from_demo(result), where)


def chemistry(result: Result, where: str) -> str:
    """Closeness to both published chemistry experts."""
    columns = ["pistachio", "schneider", "both", "agreement"]
    rows = []
    for row in result["rows"]:
        cells = [
            f"{statistics.fmean(v):.3f}" + (f" ± {statistics.stdev(v):.3f}" if len(v) > 1 else "")
            for v in (row["scores"][column] for column in columns)
        ]
        rows.append([row["method"], *cells, f"{statistics.fmean(row['seconds']):.0f}"])
    head = ["method", "cosine with pistachio", "with schneider", "mean", "same class", "seconds"]
    made = result["construct"]
    note = (
        f"Fingerprints of {result['reactions']} textbook reactions; same class: how often the "
        "merged encoder under the Schneider expert's head names that expert's class. Nothing is "
        f"tuned. {made['anchors']} anchors of {made['tokens']} tokens, {made['steps']} steps; "
        f"{result['seeds']} seed(s). `python benchmarks/quality/chemistry_experts.py`. ({where})"
    )
    return f"{markdown(head, rows)}\n\n{note}"


def alone(result: Result, where: str) -> str:
    """What one task's anchors hold of its expert."""
    labels = {
        "pretrained": "pretrained",
        "initial": "rows of its weights",
        "anchors": "its anchors (weights)",
        "gaussian initial": "noise",
        "gaussian": "its anchors (Gauss)",
        "real": "its real activations",
        "experts": "expert",
    }
    columns = [column for column in labels if column in result]
    rows = [
        [task, *(f"{100 * result[column][task]:.1f}" for column in columns)]
        for task in result["experts"]
    ]
    means = [100 * statistics.fmean(result[column].values()) for column in columns]
    rows.append(["average", *(f"{mean:.1f}" for mean in means)])
    head = ["accuracy, %", *(labels[column] for column in columns)]
    note = f"One task at a time. `python benchmarks/quality/alone.py {result['suite']}`. ({where})"
    return f"{markdown(head, rows)}\n\n{note}"


EVIDENCE: dict[str, tuple[str, Callable[[Result, str], str]]] = {
    "quality-text": ("quality-text", methods),
    "quality-vision": ("quality-vision", methods),
    "quality-vision-joint": ("quality-vision-joint", methods),
    "claims-vision": ("quality-vision", verdicts),
    "claims-vision-joint": ("quality-vision-joint", verdicts),
    "claims-text": ("quality-text", verdicts),
    "claims-demo": ("demo", demo_verdicts),
    "chemistry": ("quality-chemistry", chemistry),
    "alone-vision": ("quality-alone-vision", alone),
    "published-vision": ("quality-vision", published),
    "published-text": ("quality-text", published),
    **{
        f"ablate-{name}": (f"quality-ablate-{name}", ablation)
        for name in ("steps", "anchors", "tokens", "sigma", "distance", "precision", "optimiser",
                     "patience", "sign")
    },
}  # fmt: skip
