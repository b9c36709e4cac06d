"""TSV-M and WUDI against straightforward implementations, equal inputs, side by side.

    python benchmarks/bench_starting.py                # 8 tasks x [1024, 4096] and [4096, 1024]
    python benchmarks/bench_starting.py --shapes 256x512 --wudi-steps 300 --repeats 3

The straightforward implementations do what the definitions (and the published scripts) say: full
SVDs; the loss written out, autograd, torch.optim.Adam. WUDI is timed over fewer than its 300 steps
where a full run takes minutes; the time of the 300 is put together from two lengths of run, which
separates the cost of a step from what is done once.

Errors are relative Frobenius distances to the straightforward implementation in float64.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from common import environment, interleaved, peak_memory, ratio, summary, write_json
from torch import Tensor

from fda_fast.starting import tsv, wudi


def task_vectors(kind: str, tasks: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    """[K, o, i] float32: "full" rank with a power-law spectrum and shared directions, or "lora".

    Fine-tuned task vectors have long-tailed spectra and experts of one base share some of their
    leading directions; "full" imitates both. "lora" is a product of rank 16.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "lora":
        return 1e-3 * torch.stack([draw(rows, 16) @ draw(16, columns) for _ in range(tasks)])
    rank = min(rows, columns)
    shared_left, shared_right = draw(rows, rank), draw(rank, columns)
    decay = (1 + torch.arange(rank)) ** -0.6
    stack = []
    for _ in range(tasks):
        left = (0.5 * shared_left + draw(rows, rank)) * decay
        stack.append(left @ (0.5 * shared_right + draw(rank, columns)))
    return 1e-3 * torch.stack(stack) / rank**0.5


def plain_tsv(deltas: Tensor) -> Tensor:
    """TSV-M as defined, by full SVDs. [K, o, i] -> [o, i]."""
    tasks, rows, columns = deltas.shape
    rank = min(rows, columns)
    k = rank // tasks
    left, values, right = (deltas.new_zeros(s) for s in ((rows, rank), (rank,), (rank, columns)))
    for index, delta in enumerate(deltas):
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        block = slice(index * k, (index + 1) * k)
        left[:, block], values[block], right[block] = u[:, :k], s[:k], vt[:k]
    p, _, qt = torch.linalg.svd(left, full_matrices=False)
    p2, _, qt2 = torch.linalg.svd(right, full_matrices=False)
    return p @ qt @ torch.diag(values) @ p2 @ qt2


def plain_wudi(deltas: Tensor, steps: int, lr: float = 1e-5) -> Tensor:
    """WUDI as defined, the loss through autograd. [K, o, i] -> [o, i]."""
    merged = deltas.sum(dim=0).requires_grad_()
    norms = deltas.square().sum(dim=(1, 2))
    optimiser = torch.optim.Adam([merged], lr=lr, weight_decay=0)
    for _ in range(steps):
        inner = (merged.unsqueeze(0) - deltas) @ deltas.transpose(1, 2)
        loss = (inner.square() / norms[:, None, None]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return merged.detach()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

METHODS: dict[str, Callable[..., Tensor]] = {
    "plain_tsv": plain_tsv,
    "tsv": tsv,
    "plain_wudi": plain_wudi,
    "wudi": lambda deltas, steps: wudi(deltas, steps=steps),
}


def memory_case(method: str, kind: str, shape: tuple[int, int, int], *arguments: int) -> Callable:
    """For ``peak_memory``: the inputs are built, the method remains to be run."""
    warm_up()
    deltas = task_vectors(kind, *shape)
    return lambda: METHODS[method](deltas, *arguments)


def warm_up() -> None:
    """First calls import and initialise much; that is not what is measured."""
    deltas = task_vectors("full", 2, 64, 96)
    for method in METHODS:
        METHODS[method](deltas, *([2] if "wudi" in method else []))


def error(result: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.vector_norm(result.double() - exact)
    return float(f"{difference / torch.linalg.vector_norm(exact):.3g}")


def extra_mib(methods: dict[str, str], *case: object) -> dict[str, float]:
    """Peak memory beyond the task vectors, in processes of their own."""
    found = {}
    for label, method in methods.items():
        memory = peak_memory(memory_case, method, *case)
        found[f"{label}_extra_mib"] = round(memory["peak_mib"] - memory["before_mib"], 1)
    return found


def bench_tsv(kind: str, shape: tuple[int, int, int], options: argparse.Namespace) -> dict:
    deltas = task_vectors(kind, *shape)
    functions = {"plain": lambda: plain_tsv(deltas), "fda_fast": lambda: tsv(deltas)}
    seconds = interleaved(functions, repeats=options.repeats, warmup=0, clock=CLOCKS[options.clock])
    row: dict = {"method": "tsv", "task_vectors": kind, "shape": shape}
    row |= {name: summary(times) for name, times in seconds.items()}
    row["speedup"] = ratio(seconds, "plain", "fda_fast")
    if kind == "full":
        exact = plain_tsv(deltas.double())
        row |= {f"{name}_error": error(function(), exact) for name, function in functions.items()}
    else:
        # Rank 16 < k: the definition leaves the rest of the vectors open, so there is no result
        # to be equal to; see fda_fast.starting.tsv.
        row |= {"plain_error": None, "fda_fast_error": None}
    return row | extra_mib({"plain": "plain_tsv", "fda_fast": "tsv"}, kind, shape)


def bench_wudi(kind: str, shape: tuple[int, int, int], options: argparse.Namespace) -> dict:
    deltas = task_vectors(kind, *shape)
    long = options.wudi_steps
    methods = {"plain": "plain_wudi", "fda_fast": "wudi"}
    # Two lengths of run each. What is done once weighs more in the fast method, so its longer
    # run is longer: the difference must stand out from the noise of the rest.
    lengths = {"plain": (long // 4, long), "fda_fast": (long // 4, min(300, 6 * long))}
    functions = {
        f"{label}_{count}": lambda method=method, count=count: METHODS[method](deltas, count)
        for label, method in methods.items()
        for count in lengths[label]
    }
    seconds = interleaved(functions, repeats=options.repeats, warmup=0, clock=CLOCKS[options.clock])
    row: dict = {"method": "wudi", "task_vectors": kind, "shape": shape}
    row |= {name: summary(times) for name, times in seconds.items()}
    whole = {}
    for label, (short, most) in lengths.items():
        first, second = (statistics.median(seconds[f"{label}_{n}"]) for n in (short, most))
        step = (second - first) / (most - short)
        whole[label] = second + (300 - most) * step
        row[f"{label}_ms_per_step"] = round(1e3 * step, 2)
        row[f"{label}_s_for_300_steps"] = round(whole[label], 2)
    row["speedup"] = round(whole["plain"] / whole["fda_fast"], 2)
    exact = plain_wudi(deltas.double(), long)
    row["moved"] = error(deltas.double().sum(dim=0), exact)
    row |= {f"{name}_error": error(METHODS[m](deltas, long), exact) for name, m in methods.items()}
    return row | extra_mib(methods, kind, shape, 2)


def wudi_fidelity(kind: str, shape: tuple[int, int, int]) -> dict:
    """All 300 steps, at a size where the float64 run is affordable."""
    deltas = task_vectors(kind, *shape)
    exact = plain_wudi(deltas.double(), 300)
    return {
        "method": "wudi, error after 300 steps",
        "task_vectors": kind,
        "shape": shape,
        "moved": error(deltas.double().sum(dim=0), exact),
        "plain_error": error(plain_wudi(deltas, 300), exact),
        "fda_fast_error": error(wudi(deltas), exact),
        "fda_fast_float64_error": error(wudi(deltas.double()), exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "4096x1024"], help="out x in")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wudi-steps", type=int, default=12, help="steps timed, 4 to 300")
    parser.add_argument("--kinds", nargs="+", default=["full", "lora"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--name", default="starting", help="of the result file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error("--clock cpu needs --threads 1: it adds up the seconds of all threads")
    shapes = [(options.tasks, *map(int, shape.split("x"))) for shape in options.shapes]
    print(environment())
    warm_up()
    rows = []
    for kind, shape in itertools.product(options.kinds, shapes):
        for bench in (bench_tsv, bench_wudi):
            rows.append(bench(kind, shape, options))
            print(rows[-1], flush=True)
        rows.append(wudi_fidelity(kind, (shape[0], shape[1] // 8, shape[2] // 8)))
        print(rows[-1], flush=True)
    path = write_json(options.name, {"clock": options.clock, "rows": rows})
    print("written:", path.name)


if __name__ == "__main__":
    main()
