"""One construction step: time, peak memory and error of dL/dX, fda_fast beside its peers.

    python benchmarks/bench_step.py                # the CPU's cases, or the GPU's if there is one
    python benchmarks/bench_step.py --cases swiglu_1024 --repeats 3 --no-compile
    python benchmarks/bench_step.py --dry-run      # what the GPU's rows will take, without one

All engines of a case start from the same anchors and run in turn in every round; medians of rounds
are compared. The error is relative to float64 autograd, at |tau|/|theta| of ``--ratio`` and, in
``fidelity``, at the four ratios. A step of K tasks counts as one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES, CPU_CASES, GPU_CASES, Case, make
from common import environment, interleaved, peak_memory, ratio, summary, write_json
from peers import ENGINES, PEER_TF32, tf32
from products import product_flops
from torch.utils._python_dispatch import TorchDispatchMode

from fda_fast.layers.precision import fast_bf16

RATIOS = (1e-1, 1e-2, 1e-3, 1e-4)


def variants(device: str, compile_peer: bool) -> list[tuple[str, str, str]]:
    """(engine, precision, backend) of every row; backend "" is the default."""
    if device == "cpu":
        found = [
            ("published", "fp32", ""),
            ("compiled", "fp32", ""),
            ("autograd", "fp32", ""),
            ("fda_fast", "fp32", "torch"),
            ("fda_fast", "fp32", ""),
        ]
        if fast_bf16():
            found += [("compiled", "bf16", ""), ("fda_fast", "bf16", "")]
    else:
        # The compiled peer last: its compiler takes the longest.
        found = [("fda_fast", p, "") for p in ("bf16", "tf32", "fp32")]
        found += [("published", "fp32", ""), ("published", "tf32", "")]
        found += [("fda_fast_parts", "bf16", "")]
        found += [("compiled", p, "") for p in ("bf16", "tf32", "fp32")]
    return [v for v in found if compile_peer or v[0] != "compiled"]


class _Counter(TorchDispatchMode):
    """Counts matrix products; FlopCounterMode's module hooks forbid autograd.grad to a leaf.

    Nor do torch's own formulas know the products of bfloat16 into float32.
    """

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.flops += product_flops(func, args)
        return func(*args, **(kwargs or {}))


class Variant:
    """One engine bound to one case, run under its own switches."""

    def __init__(
        self,
        case: Case,
        variant: tuple[str, str, str],
        share: float,
        device: str,
        inputs: tuple | None = None,
    ) -> None:
        self.engine, self.precision, self.backend = variant
        with self:
            self.bound = ENGINES[self.engine](
                *(inputs or make(case, share, device)), case, self.precision
            )

    def __enter__(self) -> None:
        self._before = os.environ.get("FDA_FAST_BACKEND")
        if self.backend:
            os.environ["FDA_FAST_BACKEND"] = self.backend
        self._tf32 = tf32(self.engine in PEER_TF32 and self.precision == "tf32")
        self._tf32.__enter__()

    def __exit__(self, *_: object) -> None:
        self._tf32.__exit__(None, None, None)
        if self._before is None:
            os.environ.pop("FDA_FAST_BACKEND", None)
        else:
            os.environ["FDA_FAST_BACKEND"] = self._before

    def step(self) -> None:
        with self:
            self.bound.step()

    def error(self, case: Case, anchors: torch.Tensor, gold: torch.Tensor) -> float:
        """Relative error of dL/dX at the first ``case.checked`` anchors."""
        with self:
            got = self.bound.gradient(anchors[:, : case.checked])
        return float(f"{(got.double() - gold).norm() / gold.norm():.3g}")

    def flops(self) -> int:
        """Multiply-adds of its matrix products in a step, times two."""
        with _Counter() as counter, self, self.uncompiled():
            self.bound.plain_step()
        return counter.flops

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """The compiled peer as written: the same operations, which its compiler hides."""
        if self.engine != "compiled":
            yield
            return
        compiled, self.bound._both = self.bound._both, self.bound._eager
        try:
            yield
        finally:
            self.bound._both = compiled


def oracle(case: Case, share: float, device: str) -> torch.Tensor:
    """dL/dX by float64 autograd; no layer of the cases computes in less when told float64."""
    pretrained, finetuned, anchors = make(case, share, device, torch.float64)
    anchors = anchors[:, : case.checked]
    return ENGINES["autograd"](pretrained, finetuned, anchors, case, "fp32").gradient(anchors)


def memory_setup(name: str, variant: tuple[str, str, str], share: float):
    """For ``peak_memory``: the layers are there; binding the engine and two steps remain."""
    case = CASES[name]
    inputs = make(case, share)

    def work() -> None:
        bound = Variant(case, variant, share, "cpu", inputs)
        bound.step()
        bound.step()

    return work


def peak(case: Case, variant: tuple[str, str, str], share: float) -> int:
    """Bytes beyond the layers and anchors at the height of a step."""
    found = peak_memory(memory_setup, case.name, variant, share)
    return round((found["peak_mib"] - found["before_mib"]) * 2**20)


def run(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The CPU's rows of one case; the card's are in card.py."""
    # The compiled peers of all cases are one function, compiled eight times at most.
    torch._dynamo.reset()
    device, share = options.device, options.ratio
    gold = oracle(case, share, device)
    anchors = make(case, share, device)[2]
    bound = {}
    for variant in variants(device, options.compile):
        bound[variant] = Variant(case, variant, share, device)
    seconds = interleaved({v: b.step for v, b in bound.items()}, repeats=options.repeats, warmup=2)
    stamp = environment(device)
    rows = []
    reference = ("published", "fp32", "")
    for variant, engine in bound.items():
        times = summary(seconds[variant])
        flops = engine.flops()
        row = {
            "case": case.name,
            "engine": variant[0],
            "precision": variant[1],
            "backend": variant[2] or "auto",
            "ratio": share,
            "ms": times["ms_median"],
            **times,
            "speedup": ratio(seconds, reference, variant),
            "peak_bytes": peak(case, variant, share),
            "grad_rel_error": engine.error(case, anchors, gold),
            "gflop": round(flops / 1e9, 2),
            "tflops": round(flops / times["ms_median"] / 1e9, 4),
            "gpu": None,
            "cpu": stamp["cpu"],
            "threads": stamp["threads"],
            "driver": None,
            "torch": torch.__version__,
            "triton": None,
            "commit": stamp["commit"],
            "date": stamp["date"],
        }
        rows.append(row)
        print(
            f"{case.name:22s} {row['engine']:10s} {row['precision']:5s} {row['backend']:6s}"
            f"{row['ms']:10.1f} ms {row['speedup']:6.2f}x {row['gflop']:9.1f} GFLOP"
            f"{row['peak_bytes'] / 2**20:8.0f} MiB   error {row['grad_rel_error']:.1e}",
            flush=True,
        )
    return rows


def fidelity(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Error of dL/dX by precision and ratio; what a CPU lacks is rounded as a card would."""
    engines = [("autograd", "fp32", "")]
    if fast_bf16():
        engines += [("compiled", "bf16", "")]
    engines += [("fda_fast", precision, "") for precision in ("fp32", "tf32", "bf16")]
    rows = []
    for share in RATIOS:
        gold = oracle(case, share, options.device)
        anchors = make(case, share, options.device)[2]
        for variant in engines:
            engine = Variant(case, variant, share, options.device)
            with engine.uncompiled():
                error = engine.error(case, anchors, gold)
            rows.append(
                {
                    "case": case.name,
                    "engine": variant[0],
                    "precision": variant[1],
                    "ratio": share,
                    "grad_rel_error": error,
                }
            )
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--ratio", type=float, help="|tau| / |theta| of the timed rows; default 1e-2, on a GPU 1e-3"
    )
    parser.add_argument("--engines", nargs="+", help="on a GPU: of these alone")
    parser.add_argument(
        "--missing", action="store_true", help="on a GPU: only rows that the file does not have"
    )
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="on a GPU: begin no row after so many"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="counts of the GPU's rows, and times from them"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-fidelity", dest="fidelity", action="store_false")
    parser.add_argument("--out", type=Path, help="folder for the file; default: results/<machine>")
    options = parser.parse_args()
    if options.dry_run:
        import dry_run

        return dry_run.main(options.cases or GPU_CASES, options)
    if options.ratio is None:
        options.ratio = 1e-2 if options.device == "cpu" else 1e-3
    names = options.cases or (CPU_CASES if options.device == "cpu" else GPU_CASES)
    print(environment(options.device))
    if options.device == "cuda":
        import card

        return card.main(names, options)
    rows, table = [], []
    for name in names:
        rows += run(CASES[name], options)
        if options.fidelity and CASES[name].tasks == 1:
            table += fidelity(CASES[name], options)
        path = write_json("step", {"rows": rows, "fidelity": table}, folder=options.out)
    print(path)


if __name__ == "__main__":
    main()
