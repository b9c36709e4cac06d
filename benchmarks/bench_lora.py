"""A construction step of LoRA experts: task vectors as two thin factors, against formed products.

    python benchmarks/bench_lora.py
    python benchmarks/bench_lora.py --cases swiglu_1024 --repeats 3

Processor seconds of one thread, both sides in turn. Beside each time stands the error of dL/dX
against float64 autograd on the exact sum pretrained + B A, and the memory that weights and a step
take beyond the pretrained and fine-tuned layers and the anchors.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time

import torch
from cases import CASES
from common import environment, interleaved, peak_memory, ratio, summary, write_json

from fda_fast import layers
from fda_fast.layers.factored import attach_factors
from fda_fast.testing import relative_error

RANK, CHANGE = 16, 1e-2


def make(case: str, tasks: int, factored: bool):
    """Pretrained layer, fine-tuned ones, anchors, and the factors by name of every task."""
    torch.manual_seed(0)
    pretrained = CASES[case].build().eval()
    finetuned, factors = [], []
    for _ in range(tasks):
        layer, of_task = copy.deepcopy(pretrained), {}
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if p.dim() == 2:
                    b, a = torch.randn(p.shape[0], RANK), torch.randn(RANK, p.shape[1])
                    b *= CHANGE * p.norm() / (b @ a).norm()
                    of_task[name] = b, a
                    p += b @ a
        if factored:
            attach_factors(layer, of_task)
        finetuned.append(layer)
        factors.append(of_task)
    anchors = 0.5 * torch.randn(tasks, *CASES[case].shape)
    return pretrained, finetuned, anchors, factors


def step(case: str, tasks: int, factored: bool):
    pretrained, finetuned, anchors, _ = make(case, tasks, factored)
    shape = tuple(anchors.shape[1:])
    gc.collect()

    def work():
        problem = layers.bind(pretrained, finetuned, shape=shape, engine="program")
        return problem.evaluate(anchors)

    return work


def run(case: str, tasks: int, repeats: int) -> dict[str, object]:
    problems, found = {}, {}
    for engine, factored in (("product", False), ("factors", True)):
        pretrained, finetuned, anchors, factors = make(case, tasks, factored)
        problems[engine] = layers.bind(
            pretrained, finetuned, shape=tuple(anchors.shape[1:]), engine="program"
        )
        found[engine] = problems[engine].evaluate(anchors).grad
    wide = copy.deepcopy(pretrained).double()
    exact = []
    for of_task in factors:
        layer = copy.deepcopy(wide)
        with torch.no_grad():
            for name, (b, a) in of_task.items():
                layer.get_parameter(name).add_(b.double() @ a.double())
        exact.append(layer)
    oracle = layers.bind(wide, exact, shape=tuple(anchors.shape[1:]), engine="autograd")
    gold = oracle.evaluate(anchors.double()).grad
    seconds = interleaved(
        {name: lambda p=problem: p.evaluate(anchors) for name, problem in problems.items()},
        repeats=repeats,
        clock=time.process_time,
    )
    rows = []
    for name, factored in (("product", False), ("factors", True)):
        memory = peak_memory(step, case, tasks, factored)
        rows.append(
            {
                "engine": name,
                **summary(seconds[name]),
                "error": relative_error(found[name], gold),
                "mib": round(memory["peak_mib"] - memory["before_mib"], 1),
            }
        )
    speedup = ratio(seconds, "product", "factors")
    return {"case": case, "tasks": tasks, "rank": RANK, "speedup": speedup, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["swiglu_1024", "minilm_layer", "roberta_base_layer"]
    parser.add_argument("--cases", nargs="+", default=known, choices=known)
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in arguments.cases:
        for tasks in arguments.tasks:
            rows.append(run(case, tasks, arguments.repeats))
            for row in rows[-1]["rows"]:
                print(
                    f"{case:20s} {tasks} tasks {row['engine']:8s} {row['ms_median']:9.1f} ms   "
                    f"error {row['error']:.1e}   {row['mib']:.0f} MiB"
                )
            print(f"{'':28s} {rows[-1]['speedup']}x", flush=True)
    print(environment())
    print(write_json("lora", {"rows": rows}))


if __name__ == "__main__":
    main()
