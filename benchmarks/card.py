"""The card's half of bench_step.py: one variant at a time, queued steps, exact rows.

A card is not shared while it is measured, and the large cases do not leave room for two engines at
once, so variants follow one another, each made afresh. Steps are queued until a measurement takes
50 ms and more, with CUDA events around it, so that what is timed is the card and not the host; the
published loop waits for the host twice a step, as published.

Writes results/<gpu>/step.json, a list of rows with exactly the keys of ``KEYS``, after every row:
nothing is lost when time runs out, and ``--missing`` goes on from there. Rows at the ratio of
``--ratio`` carry times; those at the other ratios carry the error alone, the compiled peer's
without its compiler, which takes minutes. A variant that cannot run (memory, usually) has a row
with nothing but nulls, and its error on stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
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
# What makes two rows the same measurement.
IDENTITY = ("case", "engine", "precision", "ratio")
# Shortest measurement, milliseconds.
LONG_ENOUGH = 50.0
# Products of a SwiGLU step in delta form that the target counts (2 N d h operations each).
COUNTED_PRODUCTS = 25


class Rows:
    """The rows of one file, written whenever one is added.

    Args:
        path: of the file; what it holds stays, but for rows that are measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else []
        self.by_identity = {self._identity(row): row for row in found}

    @staticmethod
    def _identity(row: dict[str, Any]) -> tuple:
        return tuple(row[key] for key in IDENTITY)

    def add(self, row: dict[str, Any]) -> None:
        self.by_identity[self._identity(row)] = {key: row[key] for key in KEYS}
        whole = json.dumps([*self.by_identity.values()], indent=1) + "\n"
        beside = self.path.with_suffix(".tmp")
        beside.write_text(whole)
        beside.replace(self.path)

    def has(self, row: dict[str, Any]) -> bool:
        """Whether this row was measured before, and gave an error of dL/dX at least."""
        found = self.by_identity.get(self._identity(row))
        return found is not None and found["grad_rel_error"] is not None


def stamp() -> dict[str, Any]:
    found = environment("cuda")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        said = []
    return {
        "gpu": found["gpu"],
        "driver": said[0] if said else None,
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


def measure(engine: Variant, before: int, repeats: int) -> dict[str, Any]:
    """ms, and peak bytes beyond the layers and anchors, which take ``before``."""
    with engine:
        engine.bound.plain_step()
        # What binding needed for its own checks is not the step's; what it keeps is.
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        engine.bound.plain_step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return {"peak_bytes": peak, "ms": milliseconds(engine.bound.step, repeats)}


def attempt(what: str, function, *arguments) -> Any:
    """The function's result, or None and a line on stderr: a row lost is not a run lost."""
    try:
        return function(*arguments)
    except Exception as failure:
        said = str(failure).splitlines() or [""]
        print(f"{what}: {type(failure).__name__}: {said[0]}", file=sys.stderr, flush=True)
        return None


def row_of(
    case: Case, variant: tuple[str, str, str], inputs: tuple, gold: Any, share: float,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """The measured values of one row; whatever fails is left out."""
    name = f"{case.name} {variant[0]} {variant[1]}"
    found: dict[str, Any] = {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine = attempt(name, Variant, case, variant, share, "cuda", inputs)
    if engine is None:
        return found
    timed = share == options.ratio
    if timed:
        found |= attempt(name, measure, engine, before, options.repeats) or {}
    if gold is not None:
        # Compiled once, for the shape that is timed.
        if timed and case.checked is None:
            found["grad_rel_error"] = attempt(name, engine.error, case, inputs[2], gold)
        else:
            with engine.uncompiled():
                found["grad_rel_error"] = attempt(name, engine.error, case, inputs[2], gold)
    if "ms" in found:
        flops = attempt(name, engine.flops)
        found["tflops"] = None if flops is None else flops / found["ms"] / 1e9
    return found


def rows_of(
    case: Case, options: argparse.Namespace, common: dict[str, Any], rows: Rows, until: float
) -> None:
    """Measure the rows of a case that are wanted, as long as there is time."""
    others = [share for share in RATIOS if share != options.ratio] if options.fidelity else []
    for share in (options.ratio, *others):
        empty = dict.fromkeys(KEYS) | common | {"case": case.name, "ratio": share}
        wanted = []
        for variant in variants("cuda", options.compile):
            row = empty | {"engine": variant[0], "precision": variant[1]}
            chosen = not options.engines or variant[0] in options.engines
            if chosen and not (options.missing and rows.has(row)):
                wanted.append((variant, row))
        if not wanted or time.monotonic() > until:
            continue
        gold = attempt(f"{case.name} oracle", oracle, case, share, "cuda")
        release()
        inputs = make(case, share, "cuda")
        for variant, row in wanted:
            if time.monotonic() > until:
                print(f"no time left for {case.name} {variant[0]} {variant[1]} {share:.0e}")
                continue
            row |= row_of(case, variant, inputs, gold, share, options)
            rows.add(row)
            show(row)
            release()
        del gold, inputs
        release()


def ceilings() -> dict[str, float]:
    """TFLOP/s of products of 8192^3 by precision and TB/s of a copy, measured here."""
    from peers import tf32

    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        with tf32(name == "tf32"):
            ms = milliseconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 7)
        found[f"{name}_tflops"] = 2 * 8192**3 / ms / 1e9
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    found["copy_tb_per_s"] = 2 * x.nbytes / milliseconds(lambda: y.copy_(x), 7) / 1e9
    return found


def show(row: dict[str, Any]) -> None:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
    print(
        f"{row['case']:22s} {row['engine']:14s} {row['precision']:5s} {row['ratio']:.0e} "
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
        least = min((row["grad_rel_error"] or float("inf") for row in peers), default=float("nan"))
        print(
            f"{name}: {base['ms'] / ours['ms']:.1f}x published fp32, {best / ours['ms']:.2f}x best "
            f"compiled; error {ours['grad_rel_error']} against {least} of the best compiled; "
            f"memory {ours['peak_bytes'] / base['peak_bytes']:.2f} of published"
        )
        parts = found.get(("fda_fast_parts", "bf16"))
        if parts is not None:
            print(
                f"  in parts: {base['ms'] / parts['ms']:.1f}x, "
                f"memory {parts['peak_bytes'] / base['peak_bytes']:.2f} of published"
            )
        if name == "llama2_13b_mlp":
            counted = COUNTED_PRODUCTS * 2 * 8192 * 5120 * 13824 / ours["ms"] / 1e9
            share = counted / limits["bf16_tflops"]
            print(f"  {counted:.0f} TFLOP/s counting 25 products: {share:.0%} of the ceiling")


def main(names: list[str], options: argparse.Namespace) -> None:
    until = time.monotonic() + options.seconds
    limits, common = ceilings(), stamp()
    print({key: round(value, 2) for key, value in limits.items()})
    release()
    folder = options.out or RESULTS / slug(common["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(Path(folder) / "step.json")
    for name in names:
        rows_of(CASES[name], options, common, rows, until)
    targets([*rows.by_identity.values()], limits)
    print(rows.path)
