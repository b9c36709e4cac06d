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
SPEED = ROOT / "docs" / "speed.md"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks" / "quality")]

import sections  # noqa: E402
import speed  # noqa: E402
from speed import where  # noqa: E402
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
SCALE_SECTIONS: Sections = {"parts": ("parts", speed.parts)}
SECTIONS: Sections = {
    "demo": ("demo", demo),
    "quality": ("quality-vision", quality),
    "step": ("step", speed.step),
    "merge": ("merge", speed.merge),
}
SPEED_SECTIONS: Sections = {
    "steps": ("step", speed.steps),
    "gain": ("step", speed.gain),
    "fidelity": ("step", speed.fidelity),
    "lora": ("lora", speed.lora),
    "adapt": ("adapt", speed.adapt),
    "starting": ("starting", speed.starting),
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
        (SPEED, SPEED_SECTIONS),
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
