"""Every kernel and matrix product of a step on a GPU, against the card's own measured ceilings.

    python benchmarks/bench_kernels.py            # results/<gpu>/kernels.json
    python benchmarks/bench_kernels.py --list     # the rows, without a GPU

Operations are those of tests/gpu at the shapes of real layers, in the order they are listed there.
Bandwidth counts each input read and each output written once, so attention, whose time goes into
products, shows little of it. Products are the ones of the Llama-2-13B
MLP, as the program multiplies them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from card import ceilings, milliseconds, stamp
from common import RESULTS, slug

from fda_fast.layers.precision import NAMES, Precision
from fda_fast.ops import adamw, coefficients, dispatch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "gpu"))

from op_cases import STEMS, cases, has, module, moved_bytes, results

REPEATS = 5
# N, d and packed h of the Llama-2-13B MLP: rows @ W^T, rows @ W, and the gradient rows^T @ rows.
ROWS, WIDTH, HIDDEN = 8192, 5120, 2 * 13824


def real(on_card: Any, dry: Any) -> Any:
    return on_card


def operations() -> Iterator[dict[str, Any]]:
    """A row per operation, backend and storage type."""
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int, dtype=dtype, generator=generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        for stem in STEMS:
            for backend in ("triton", "cuda"):
                if not has(stem, backend) or dispatch.available()[backend]:
                    continue
                for number, (run, arguments) in enumerate(cases(stem, draw, real)):
                    implementation = module(stem, backend)
                    outputs = results(run(implementation, *arguments))
                    moved = moved_bytes(arguments, outputs)
                    del outputs
                    ms = milliseconds(
                        lambda r=run, m=implementation, a=arguments: r(m, *a), REPEATS
                    )
                    yield {
                        "operation": stem,
                        "case": number,
                        "backend": backend,
                        "dtype": str(dtype).removeprefix("torch."),
                        "ms": ms,
                        "tb_per_s": moved / ms / 1e9,
                    }


def optimisers() -> Iterator[dict[str, Any]]:
    """Both optimisers at the anchors and the largest weight of the Llama-2-13B MLP."""
    x, g, m, v, best = (torch.rand(1, ROWS, WIDTH, device="cuda") for _ in range(5))
    loss, best_loss = torch.rand(1, device="cuda"), torch.zeros(1, device="cuda")
    alpha, tau = (torch.rand(4, HIDDEN // 2, WIDTH, device="cuda") for _ in range(2))
    grad, avg, sq, delta = (torch.rand_like(alpha[0]) for _ in range(4))
    step = torch.ones((), dtype=torch.int64, device="cuda")
    for backend in ("triton", "cuda"):
        if dispatch.available()[backend]:
            continue
        # Reads x, g and both moments, writes x and the moments: no anchors better than the best.
        calls = {
            "adamw": (
                lambda to=backend: adamw.step_(
                    x, g, m, v, step, loss, best_loss, best, 1e-2, backend=to
                ),
                7 * x.nbytes,
            ),
            "coefficients of 4 tasks": (
                lambda to=backend: coefficients.update_(
                    alpha, tau, grad, avg, sq, delta, step, 1e-2, backend=to
                ),
                3 * alpha.nbytes + 6 * grad.nbytes,
            ),
        }
        for name, (call, moved) in calls.items():
            ms = milliseconds(call, REPEATS)
            row = {"operation": name, "backend": backend, "dtype": "float32"}
            yield row | {"ms": ms, "tb_per_s": moved / ms / 1e9}


def products() -> Iterator[dict[str, Any]]:
    """A row per precision and form of product: written, and added to what is there."""
    shapes = {
        "rows @ W^T": (ROWS, WIDTH, HIDDEN),
        "rows @ W": (ROWS, HIDDEN, WIDTH),
        "rows^T @ rows": (HIDDEN, ROWS, WIDTH),
    }
    for name in NAMES:
        precision = Precision(name, "cuda")
        for form, (m, k, n) in shapes.items():
            a, b = torch.randn(m, k, device="cuda"), torch.randn(k, n, device="cuda")
            if form == "rows @ W^T":
                b = torch.randn(n, k, device="cuda").t()
            if form == "rows^T @ rows":
                a = torch.randn(k, m, device="cuda").t()
            a, b = precision.operand(a), precision.operand(b)
            out = torch.zeros(m, n, device="cuda")
            for way, call in (("=", precision.matmul), ("+=", precision.accumulate)):
                order = (a, b, out) if way == "=" else (out, a, b)
                with precision.active():
                    ms = milliseconds(lambda c=call, o=order: c(*o), REPEATS)
                yield {
                    "operation": f"out {way} {form}",
                    "dtype": name,
                    "ms": ms,
                    "tflops": 2 * m * k * n / ms / 1e9,
                }


def shown(row: dict[str, Any], limits: dict[str, float]) -> str:
    if "tflops" in row:
        rate, unit, limit = row["tflops"], "TFLOP/s", limits[f"{row['dtype']}_tflops"]
    else:
        rate, unit, limit = row["tb_per_s"], "TB/s", limits["copy_tb_per_s"]
    what = f"{row['operation']} {row.get('case', '')} {row.get('backend', '')} {row['dtype']}"
    return f"{what:44s} {row['ms']:9.3f} ms {rate:8.2f} {unit:7s} {rate / limit:5.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the operations, without running them")
    parser.add_argument("--out", type=Path, help="folder for the file; default: results/<gpu>")
    options = parser.parse_args()
    if options.list:
        for stem in STEMS:
            count = sum(1 for _ in cases(stem, lambda *s: torch.empty(s, device="meta"), real))
            print(f"{stem}: {count} cases, {[b for b in ('triton', 'cuda') if has(stem, b)]}")
        return
    common, limits = stamp(), ceilings()
    folder = options.out or RESULTS / slug(common["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for make in (products, operations, optimisers):
        for row in make():
            rows.append(row)
            print(shown(row, limits), flush=True)
            whole = {**common, "ceilings": limits, "rows": rows}
            (folder / "kernels.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
