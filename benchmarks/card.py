"""The card's half of bench_step.py: one variant at a time, queued steps, exact rows.

A card is not shared while it is measured, and the large cases do not leave room for two engines at
once, so variants follow one another, each made afresh. Steps are queued until a measurement takes
50 ms and more, with CUDA events around it, so that what is timed is the card and not the host; the
published loop waits for the host twice a step, as published.

Writes results/<gpu>/step.json: a list of rows with exactly the keys of ``KEYS``. Rows at the ratio
of ``--ratio`` carry times; those at the other ratios carry the error alone. A variant that cannot
run (memory, usually) has a row with nothing but nulls, and its error on stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_step import RATIOS, Variant, oracle, variants
from cases import CASES, Case, make
from common import RESULTS, environment, slug

KEYS = (
    "case", "engine", "precision", "ratio", "ms", "peak_bytes", "grad_rel_error", "tflops",
    "gpu", "driver", "torch", "triton", "commit", "date",
)  # fmt: skip
# Shortest measurement, milliseconds.
LONG_ENOUGH = 50.0
# Products of a SwiGLU step in delta form that the target counts (2 N d h operations each).
COUNTED_PRODUCTS = 25


def stamp() -> dict[str, Any]:
    found = environment("cuda")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "gpu": found["gpu"],
        "driver": driver,
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": found["commit"],
        "date": found["date"],
    }


def milliseconds(step, repeats: int) -> float:
    """Median time of one step over measurements of LONG_ENOUGH and more."""
    for _ in range(5):
        step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(count: int) -> float:
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    count = max(1, int(LONG_ENOUGH / max(measure(3) / 3, 1e-3)) + 1)
    return statistics.median(measure(count) / count for _ in range(repeats))


def release() -> None:
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def measure(case: Case, variant: tuple[str, str, str], share: float, repeats: int) -> dict:
    """ms, peak bytes beyond layers and anchors, TFLOP/s of the products in a step."""
    inputs = make(case, share, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine = Variant(case, variant, share, "cuda", inputs)
    with engine:
        engine.bound.plain_step()
        # What binding needed for its own checks is not the step's; what it keeps is.
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        engine.bound.plain_step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        ms = milliseconds(engine.bound.step, repeats)
    return {"ms": ms, "peak_bytes": peak, "tflops": engine.flops() / ms / 1e9}


def error(case: Case, variant: tuple[str, str, str], share: float, gold: torch.Tensor) -> float:
    return Variant(case, variant, share, "cuda").error(case, share, "cuda", gold)


def attempt(what: str, function, *arguments) -> Any:
    """The function's result, or None and a line on stderr."""
    try:
        return function(*arguments)
    except (RuntimeError, torch.OutOfMemoryError) as failure:
        print(f"{what}: {str(failure).splitlines()[0]}", file=sys.stderr, flush=True)
        return None
    finally:
        release()


def ceilings() -> dict[str, float]:
    """TFLOP/s of a bf16 product of 8192^3 and TB/s of a copy, measured here."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / milliseconds(lambda: a @ b, 7) / 1e9
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / milliseconds(lambda: y.copy_(x), 7) / 1e9
    return {"bf16_tflops": product, "copy_tb_per_s": copy}


def rows_of(case: Case, options: argparse.Namespace, common: dict[str, Any]) -> list[dict]:
    rows = []
    for share in sorted({options.ratio, *(RATIOS if options.fidelity else ())}, reverse=True):
        gold = attempt(f"{case.name} oracle", oracle, case, share, "cuda")
        for variant in variants("cuda", options.compile):
            name = f"{case.name} {variant[0]} {variant[1]}"
            found: dict[str, Any] = {}
            if share == options.ratio:
                found = attempt(name, measure, case, variant, share, options.repeats) or {}
            if gold is not None:
                found["grad_rel_error"] = attempt(name, error, case, variant, share, gold)
            row = dict.fromkeys(KEYS) | common | found
            row |= {"case": case.name, "engine": variant[0], "precision": variant[1]}
            rows.append({key: (row | {"ratio": share})[key] for key in KEYS})
            show(rows[-1])
        del gold
        release()
    return rows


def show(row: dict[str, Any]) -> None:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
    print(
        f"{row['case']:22s} {row['engine']:10s} {row['precision']:5s} {row['ratio']:.0e} "
        f"{number(row['ms'], '9.3f'):>9s} ms {number(row['tflops'], '7.1f'):>7s} TFLOP/s "
        f"{number(peak, '7.2f'):>7s} GiB   error {number(row['grad_rel_error'], '.1e')}",
        flush=True,
    )


def targets(rows: list[dict], limits: dict[str, float]) -> None:
    """The ratios that the project aims at, from these rows."""
    timed = [row for row in rows if row["ms"] is not None]
    for name in dict.fromkeys(row["case"] for row in timed):
        found = {(r["engine"], r["precision"]): r for r in timed if r["case"] == name}
        ours, base = found.get(("fda_fast", "bf16")), found.get(("published", "fp32"))
        peers = [row for (engine, _), row in found.items() if engine == "compiled"]
        if ours is None or base is None:
            continue
        best = min((row["ms"] for row in peers), default=float("nan"))
        print(
            f"{name}: {base['ms'] / ours['ms']:.1f}x published fp32, {best / ours['ms']:.2f}x best "
            f"compiled, memory {ours['peak_bytes'] / base['peak_bytes']:.2f} of published"
        )
        if name == "llama2_13b_mlp":
            counted = COUNTED_PRODUCTS * 2 * 8192 * 5120 * 13824 / ours["ms"] / 1e9
            share = counted / limits["bf16_tflops"]
            print(f"  {counted:.0f} TFLOP/s counting 25 products: {share:.0%} of the ceiling")


def main(names: list[str], options: argparse.Namespace) -> None:
    limits, common = ceilings(), stamp()
    print({key: round(value, 2) for key, value in limits.items()})
    folder = options.out or RESULTS / slug(common["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(folder) / "step.json"
    rows: list[dict] = []
    for name in names:
        rows += rows_of(CASES[name], options, common)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    targets(rows, limits)
    print(path)
