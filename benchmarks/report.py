"""Write the tables of the README and of docs/ from the committed result files.

    python benchmarks/report.py            # rewrites them between their markers
    python benchmarks/report.py --check    # fails if that would change them

A marker pair `<!-- begin: NAME -->` ... `<!-- end: NAME -->` is filled by the function of that name
below, from results/<machine>/NAME.json of every machine that has one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
EVIDENCE = ROOT / "docs" / "evidence.md"
REPORT = ROOT / "docs" / "report.md"
SCALE = ROOT / "docs" / "scale.md"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks" / "quality")]

import sections  # noqa: E402
from tables import markdown as table  # noqa: E402

Result = dict[str, Any]


def results(name: str) -> list[Result]:
    """The result files of that name, one per machine, in the order of the machines' names."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]
    return [from_rows(one) if isinstance(one, list) else one for one in found]


def from_rows(rows: list[dict[str, Any]]) -> Result:
    """A card's step.json, a list of rows, in the shape of the processors'."""
    timed = [row | {"backend": "auto"} for row in rows if row["ms"] is not None]
    base = {r["case"]: r for r in timed if (r["engine"], r["precision"]) == ("published", "fp32")}
    for row in timed:
        row["speedup"] = base[row["case"]]["ms"] / row["ms"] if row["case"] in base else math.nan
    ours = [r for r in rows if r["engine"] == "fda_fast" and r["grad_rel_error"] is not None]
    return {"environment": rows[0], "rows": timed, "fidelity": ours}


def where(result: Result) -> str:
    """Machine, versions and commit of a result, for the line under a table."""
    stamp = result["environment"]
    machine = stamp.get("gpu") or f"{stamp['cpu']}, {stamp['threads']} threads"
    return f"{machine}; torch {stamp['torch']}; commit {stamp['commit']}; {stamp['date'][:10]}"


def demo(result: Result) -> str:
    """Accuracies of the demo's methods."""
    from drawing import from_record, markdown_table

    text = markdown_table(from_record(result["rows"])).rstrip()
    note = (
        f"Accuracy in % of one model on {result['texts_per_task']} held-out texts of each of four "
        f"tasks; FDA rows: mean and standard deviation over {result['seeds']} seeds. `make demo` "
        f"makes one seed of it. ({where(result)})"
    )
    return f"{text}\n\n{note}"


ENGINES = {
    "published": "published loop",
    "compiled": "functional gradient, torch.compile",
    "autograd": "autograd engine",
    "fda_fast": "**fda_fast**",
}


def step(result: Result) -> str:
    """Construction steps: time, memory and error beside the peers."""
    rows = []
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["case"] == case]
        base = found[0]["peak_bytes"]
        for row in found:
            engine = ENGINES[row["engine"]]
            if row["backend"] != "auto":
                engine = f"fda_fast, {row['backend']} twins"
            rows.append(
                [
                    case,
                    engine,
                    row["precision"],
                    f"{row['ms']:.1f}",
                    f"{row['speedup']:.2f}x",
                    f"{row['peak_bytes'] / base:.2f}",
                    f"{row['grad_rel_error']:.1e}",
                ]
            )
    head = ["layer", "engine", "precision", "ms", "speed", "memory", "error of dL/dX"]
    share = result["rows"][0]["ratio"]
    note = (
        "One construction step. Speed and memory (beyond weights and anchors) are relative to the "
        f"published loop in the same run; error against float64 autograd, fine-tuned weights "
        f"{share:.0%} away. ({where(result)})"
    )
    return f"{table(head, rows, left=3)}\n\n{note}"


def gain(result: Result) -> str:
    """What the speed of a step is made of."""
    rows = []
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        found = {(r["engine"], r["backend"]): r for r in result["rows"] if r["case"] == case}
        slow, fast = found.get(("published", "auto")), found.get(("fda_fast", "auto"))
        twins = found.get(("fda_fast", "torch"))
        if not (slow and fast and twins):
            continue
        products = slow["gflop"] / fast["gflop"]
        fusion = twins["ms"] / fast["ms"]
        total = slow["ms"] / fast["ms"]
        parts = (products, fusion, total / products / fusion, total)
        rows.append([case, *(f"{part:.2f}x" for part in parts)])
    if not rows:
        return ""
    head = ["layer", "fewer products", "fused kernels", "no tape, one pass", "together"]
    note = (
        "The factors of a step's speed: floating-point operations of its matrix products; C++ "
        "kernels against the same program on torch's operations; the rest, which is what "
        f"autograd's tape and one pass per task cost. ({where(result)})"
    )
    return f"{table(head, rows)}\n\n{note}"


def fidelity(result: Result) -> str:
    """Error of dL/dX by precision and size of the task vector."""
    found = result["fidelity"]
    ratios = sorted({row["ratio"] for row in found}, reverse=True)
    rows = []
    for case in dict.fromkeys(row["case"] for row in found):
        kinds = dict.fromkeys((r["engine"], r["precision"]) for r in found if r["case"] == case)
        for engine, precision in kinds:
            errors = {
                row["ratio"]: row["grad_rel_error"]
                for row in found
                if (row["case"], row["engine"], row["precision"]) == (case, engine, precision)
            }
            name = "autograd" if engine == "autograd" else "**fda_fast**"
            rows.append([case, name, precision, *(f"{errors[r]:.1e}" for r in ratios)])
    head = ["layer", "engine", "precision", *(f"{r:g}" for r in ratios)]
    note = (
        "Relative error of dL/dX against float64 autograd, by |task vector| / |weights|. On a CPU "
        f"tf32 and bf16 round the operands of every product as a GPU would. ({where(result)})"
    )
    return f"{table(head, rows, left=3)}\n\n{note}"


def adapt(result: Result) -> str:
    """Adaptation steps against merged weights rebuilt through autograd."""
    rows = []
    for case in result["rows"]:
        slow, fast = case["rows"]
        rows.append(
            [
                case["case"],
                case["start"],
                f"{slow['ms_median']:.1f}",
                f"{fast['ms_median']:.1f}",
                f"{case['speedup']:.2f}x",
                f"{slow['weights_error']:.1e}",
                f"{fast['weights_error']:.1e}",
            ]
        )
    head = ["layer", "start", "published, ms", "fda_fast, ms", "speed", "error", "error, fda_fast"]
    note = (
        "One adaptation step, 8 tasks, batch 128. Error: distance of the adapted weights from a "
        f"float64 run, relative to how far that run moved. ({where(result)})"
    )
    return f"{table(head, rows, left=2)}\n\n{note}"


def starting(result: Result) -> str:
    """TSV-M and WUDI against straightforward implementations."""
    rows = []
    for row in result["rows"]:
        if "speedup" not in row:
            continue
        errors = [
            "-" if row[key] is None else f"{row[key]:.1e}"
            for key in ("plain_error", "fda_fast_error")
        ]
        shape = " x ".join(map(str, row["shape"]))
        rows.append([row["method"], row["task_vectors"], shape, f"{row['speedup']:.1f}x", *errors])
    head = ["starting point", "task vectors", "tasks x out x in", "speed", "error, plain", "error"]
    note = (
        "Against a straightforward implementation; errors relative to it in float64. "
        f"({where(result)})"
    )
    return f"{table(head, rows, left=3)}\n\n{note}"


Sections = dict[str, tuple[str, Callable[[Result], str]]]
QUANTITIES = {
    "gini": ("the spectrum becomes long-tailed: Gini coefficient", 1),
    "effective_rank": ("effective rank falls", -1),
    "similarity": ("similarity with real activations rises", 1),
    "energy": ("energy in the cone of real updates rises", 1),
}


def analyses(result: Result) -> str:
    """The paper's section 3 on the demo: every quantity at the first and the last step."""
    rows = []
    for claim in result["claims"]:
        text, sign = QUANTITIES[claim["what"]]
        count, of = claim["rose"] if sign > 0 else claim["of"] - claim["rose"], claim["of"]
        digits = 1 if claim["what"] == "effective_rank" else 3
        numbers = (f"{claim[end]:.{digits}f}" for end in ("first", "last"))
        rows.append(
            [text, claim["init"], claim["layer"], *numbers, f"{count} of {of}", _verdict(count, of)]
        )
    rows.append(_bias(result, "pretrained", "the pretrained model"))
    rows.append(_bias(result, "task_arithmetic", "Task Arithmetic"))
    head = ["claim", "anchors begin at", "layer", "first step", "last step", "experts", "here"]
    made = result["settings"]["construct"]
    note = (
        f"Means over four experts; {made['steps']} steps, {made['anchors']} anchors of "
        f"{made['tokens']} tokens, one seed. Of the bias, the columns are the start and the merged "
        f"model. ({where(result)})"
    )
    return f"{table(head, rows, left=3)}\n\n{note}"


def _verdict(count: int, of: int) -> str:
    return "confirmed" if count == of else "contradicted" if not count else "mixed"


def _bias(result: Result, start: str, name: str) -> list[str]:
    """The features at the last layer, of a start and of the model merged from it."""
    last = result["bias"][-1]["layer"]
    before, after = (
        {
            row["task"]: row["relative"]
            for row in result["bias"]
            if (row["start"], row["model"], row["layer"]) == (start, model, last)
        }
        for model in ("pretrained" if start == "pretrained" else "start", "merged")
    )
    count, of = sum(after[task] < before[task] for task in before), len(before)
    means = (f"{sum(values.values()) / of:.3f}" for values in (before, after))
    text = f"FDA lowers the representation bias of {name}"
    return [text, "weights", last, *means, f"{count} of {of}", _verdict(count, of)]


def merge(result: Result) -> str:
    """Whole merges under a memory limit."""
    rows = []
    for row in result["rows"]:
        seconds = row["seconds"]
        beside = row["overlapped_seconds"] / (seconds["read"] + seconds["save"])
        rows.append(
            [
                f"{row['layers']} layers, {row['parameters'] / 1e9:.2f} G parameters",
                f"{row['peak_bytes'] / 2**30:.2f} GiB",
                f"{row['planned_peak_bytes'] / row['peak_bytes'] - 1:+.0%}",
                f"{seconds['total']:.0f} s",
                f"{row['planned_seconds'] / seconds['total'] - 1:+.0%}",
                f"{beside:.0%}",
            ]
        )
    head = ["merge", "peak memory", "planned", "time", "planned", "read and save hidden"]
    made = result["settings"]
    note = (
        f"Two bf16 experts of a synthetic Llama under `--max-memory {result['max_memory']}`, "
        f"{made['anchors']} anchors, {made['steps']} steps, {made['epochs']} epochs, on a busy "
        "machine. Planned: what `fda-fast plan` said beforehand, against what was measured. "
        "Hidden: the part of reading and saving that went on beside the computation. "
        f"({where(result)})"
    )
    return f"{table(head, rows)}\n\n{note}"


def lora(result: Result) -> str:
    """LoRA experts' task vectors as factors against the product formed."""
    rows = []
    for case in result["rows"]:
        formed, factors = case["rows"]
        rows.append(
            [
                case["case"],
                str(case["tasks"]),
                f"{case['speedup']:.2f}x",
                f"{factors['mib'] / formed['mib']:.2f}",
                f"{formed['error']:.1e}",
                f"{factors['error']:.1e}",
            ]
        )
    head = ["layer", "experts", "speed", "memory", "error, formed", "error, factors"]
    note = (
        f"A construction step of LoRA experts of rank {result['rows'][0]['rank']} whose task "
        "vector stays B A, against the same with B A formed; error of dL/dX against float64. "
        f"({where(result)})"
    )
    return f"{table(head, rows)}\n\n{note}"


def parts(result: Result) -> str:
    """Construction steps with one expert's anchors in parts."""
    rows = [
        [
            row["case"],
            str(row["parts"]),
            f"{row['part']:,}",
            f"{row['mib']:,.0f} MiB",
            f"{row['ms_median'] / 1e3:.2f} s",
            f"{row['slowdown']:.2f}x",
            f"{row['error']:.1e}",
        ]
        for row in result["rows"]
    ]
    head = ["layer", "parts", "anchors at once", "memory", "time", "against one", "error of dL/dX"]
    note = (
        "One construction step in float32. Memory is what a step takes beyond both layers, task "
        "vectors, anchors and Adam's moments; error against float64. "
        f"{result.get('note', '')} ({where(result)})"
    )
    return f"{table(head, rows)}\n\n{note}"


def beside(result: Result, names: Iterable[str]) -> dict[str, Result]:
    """The result files of these names from the machine of ``result``."""
    cpu = result["environment"]["cpu"]
    return {n: found for n in names for found in results(n) if found["environment"]["cpu"] == cpu}


def quality(result: Result) -> str:
    """All suites of the machine side by side."""
    stamp = result["environment"]
    made = f"{stamp['cpu']}; torch {stamp['torch']}; {stamp['date'][:10]}"
    return sections.summary(beside(result, sections.SUITES), made)


def repeated(result: Result) -> str:
    """The suite whose models were trained several times, side by side."""
    found = beside(result, sections.REPEATED)
    return sections.repeated(found, where(result)) if len(found) > 1 else ""


REPORT_SECTIONS: Sections = {"analyses": ("analyses", analyses)}
SCALE_SECTIONS: Sections = {"parts": ("parts", parts)}
SECTIONS: Sections = {
    "demo": ("demo", demo),
    "step": ("step", step),
    "gain": ("step", gain),
    "fidelity": ("step", fidelity),
    "adapt": ("adapt", adapt),
    "starting": ("starting", starting),
    "quality": ("quality-vision", quality),
    "lora": ("lora", lora),
    "merge": ("merge", merge),
}
EVIDENCE_SECTIONS: Sections = {
    name: (file, lambda result, section=section: section(result, where(result)))
    for name, (file, section) in sections.EVIDENCE.items()
} | {"repeated-vision-joint": ("quality-vision-joint", repeated)}


def filled(text: str, chosen: Sections = SECTIONS) -> str:
    """A document with every section written anew."""
    for name, (file, section) in chosen.items():
        pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"no markers for {name}")
        body = "\n\n".join(section(result) for result in results(file))
        body = f"{body}\n" if body else ""
        text = pattern.sub(lambda m, body=body: m[1] + body + m[2], text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    options = parser.parse_args()
    documents = (
        (README, SECTIONS),
        (EVIDENCE, EVIDENCE_SECTIONS),
        (REPORT, REPORT_SECTIONS),
        (SCALE, SCALE_SECTIONS),
    )
    for path, chosen in documents:
        before = path.read_text()
        after = filled(before, chosen)
        if not options.check:
            path.write_text(after)
        elif after != before:
            raise SystemExit(f"{path.name} is not what benchmarks/report.py writes; run it.")


if __name__ == "__main__":
    main()
