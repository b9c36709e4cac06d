"""One construction step: time, peak memory and error of dL/dX, fda_fast beside its peers.

    python benchmarks/bench_step.py                # the CPU's cases, or the GPU's if there is one
    python benchmarks/bench_step.py --cases swiglu_1024 --repeats 3 --no-compile

All engines of a case start from the same anchors and run in turn in every round; medians of rounds
are compared. The error is relative to float64 autograd, at |tau|/|theta| of ``--ratio`` and, in
``fidelity``, at the four ratios. A step of K tasks counts as one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from cases import CASES, CPU_CASES, GPU_CASES, Case, make
from common import environment, interleaved, peak_memory, ratio, summary, write_json
from peers import ENGINES, PEER_TF32, tf32
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
    else:
        found = [("published", "fp32", ""), ("published", "tf32", "")]
        found += [("compiled", p, "") for p in ("fp32", "tf32", "bf16")]
        found += [("fda_fast", p, "") for p in ("fp32", "tf32", "bf16")]
    return [v for v in found if compile_peer or v[0] != "compiled"]


class _Counter(TorchDispatchMode):
    """Counts matrix products; FlopCounterMode's module hooks forbid autograd.grad to a leaf."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


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

    def error(self, case: Case, share: float, device: str, gold: torch.Tensor) -> float:
        anchors = make(case, share, device)[2]
        with self:
            got = self.bound.gradient(anchors)
        return float(f"{(got.double() - gold).norm() / gold.norm():.3g}")

    def flops(self) -> int:
        """Multiply-adds of its matrix products in a step, times two."""
        if self.engine == "compiled":  # the same products, which the compiler hides
            bound = self.bound
            keep, bound._both = bound._both, bound._eager
        with _Counter() as counter, self:
            self.bound.plain_step()
        if self.engine == "compiled":
            bound._both = keep
        return counter.flops


def oracle(case: Case, share: float, device: str) -> torch.Tensor:
    """dL/dX by float64 autograd; no layer of the cases computes in less when told float64."""
    inputs = make(case, share, device, torch.float64)
    return ENGINES["autograd"](*inputs, case, "fp32").gradient(inputs[2])


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
    device, share = options.device, options.ratio
    gold = oracle(case, share, device)
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
            "grad_rel_error": engine.error(case, share, device, gold),
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
    """Error of dL/dX by precision and ratio; the CPU rounds operands as a card would."""
    rows = []
    for share in RATIOS:
        gold = oracle(case, share, options.device)
        for variant in [("autograd", "fp32", "")] + [
            ("fda_fast", precision, "") for precision in ("fp32", "tf32", "bf16")
        ]:
            engine = Variant(case, variant, share, options.device)
            rows.append(
                {
                    "case": case.name,
                    "engine": variant[0],
                    "precision": variant[1],
                    "ratio": share,
                    "grad_rel_error": engine.error(case, share, options.device, gold),
                }
            )
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ratio", type=float, default=1e-2, help="|tau| / |theta|")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-fidelity", dest="fidelity", action="store_false")
    parser.add_argument("--out", type=Path, help="folder for the file; default: results/<machine>")
    options = parser.parse_args()
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
