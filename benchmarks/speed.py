"""The tables of speed, memory and fidelity, from their result files; written by report.py."""

from __future__ import annotations

from typing import Any

from tables import markdown as table

Result = dict[str, Any]


def where(result: Result) -> str:
    """Machine, versions and commit of a result, for the line under a table."""
    stamp = result["environment"]
    machine = stamp.get("gpu") or f"{stamp['cpu']}, {stamp['threads']} threads"
    return f"{machine}; torch {stamp['torch']}; commit {stamp['commit']}; {stamp['date'][:10]}"


ENGINES = {
    "published": "published loop",
    "compiled": "functional gradient, torch.compile",
    "autograd": "autograd engine",
    "fda_fast": "**fda_fast**",
}
# Of the short table: (engine, precision) and what heads its column.
COLUMNS = {
    ("compiled", "fp32"): "compiled peer",
    ("fda_fast", "fp32"): "**fda_fast**",
    ("compiled", "bf16"): "compiled peer, bf16",
    ("fda_fast", "bf16"): "**fda_fast, bf16**",
}


def step(result: Result) -> str:
    """Construction steps in short: speed and error of fda_fast and of its strongest peer."""
    rows = []
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        found = {
            (row["engine"], row["precision"]): row
            for row in result["rows"]
            if row["case"] == case and row["backend"] == "auto"
        }
        base = found["published", "fp32"]
        cells = [case, f"{base['ms']:.0f} ms, {base['grad_rel_error']:.0e}"]
        for key in COLUMNS:
            row = found.get(key)
            cells.append(f"{row['speedup']:.2f}x, {row['grad_rel_error']:.0e}" if row else "")
        ours = (found.get(("fda_fast", precision)) for precision in ("fp32", "bf16"))
        shares = [f"{row['peak_bytes'] / base['peak_bytes']:.2f}" if row else "" for row in ours]
        rows.append([*cells, *shares])
    head = ["layer", "published loop", *COLUMNS.values(), "memory", "memory, bf16"]
    rows = _without_empty_columns([head, *rows])
    share = result["rows"][0]["ratio"]
    note = (
        "One construction step. Speed against the published loop in the same run, and relative "
        f"error of dL/dX against float64, fine-tuned weights {share:.0%} away; the compiled peer "
        "computes functional gradients under torch.compile, in bf16 by autocast. Memory beyond "
        f"weights and anchors, of the published loop's. ({where(result)})"
    )
    return f"{table(rows[0], rows[1:])}\n\n{note}"


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    """The table without the columns that have nothing below their head."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def steps(result: Result) -> str:
    """Construction steps in full: time, memory and error of every engine."""
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
        found = {
            (r["engine"], r["backend"]): r
            for r in result["rows"]
            if r["case"] == case and r["precision"] == "fp32"
        }
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
            rows.append([case, ENGINES[engine], precision, *(f"{errors[r]:.1e}" for r in ratios)])
    head = ["layer", "engine", "precision", *(f"{r:g}" for r in ratios)]
    native = result["environment"].get("bf16") == "native"
    rounded = "tf32 is" if native else "tf32 and bf16 are"
    note = (
        "Relative error of dL/dX against float64 autograd, by |task vector| / |weights|. On this "
        f"processor {rounded} products of float32 whose operands are rounded as a GPU would. "
        f"({where(result)})"
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
        f"{made['anchors']} anchors, {made['steps']} steps, {made['epochs']} epochs"
        f"{result.get('note', '')}. Planned: what `fda-fast plan` said beforehand, against what "
        "was measured. Hidden: the part of reading and saving that went on beside the computation. "
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
