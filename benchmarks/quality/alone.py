"""Do anchors hold what one expert knows? Each expert's own anchors alone, and all tasks' together.

    python benchmarks/quality/alone.py vision

From the pretrained model every layer is adapted to the anchors of *one* task (Eq. 5 with one task),
and scored on that task: what is missing to the expert is what the anchors do not hold. What is lost
from there to the merge of all tasks is the tasks' conflict. The same with the anchors before they
are optimised, and with real activations of the expert in their place. Rate and epochs are chosen on
the validation split, task by task.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import methods
import neighbours  # noqa: F401
import torch
from common import write_json
from run import load_suite
from suite import Suite
from torch import Tensor

import fda_fast

RATES, EPOCHS = (1e-4, 1e-3), (25, 100)


def alone(suite: Suite, task: str, anchors: Sequence[Tensor]) -> float:
    """Test accuracy on a task of the model adapted to its anchors [layer] [n, T, d] only."""
    index = suite.tasks.index(task)
    found = {}
    for lr, epochs in itertools.product(RATES, EPOCHS):
        merged = []
        for depth, layer in enumerate(suite.layers(suite.pretrained)):
            pairs = [(anchors[depth], suite.experts_at(depth)[index])]
            adapted = fda_fast.adapt(layer, pairs, lr=lr, epochs=epochs).layer
            merged.append(methods.parameters(adapted))
        model = suite.assemble(merged)
        found[lr, epochs] = [suite.accuracy(model, task, s) for s in ("validation", "test")]
    best = max(found.values(), key=lambda scores: scores[0])
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=("vision", "text"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    suite = load_suite(args.suite)
    inputs = {
        "initial": methods.construct(suite, seed=0, at=1)[0],
        "anchors": methods.construct(suite, seed=0)[0],
        "gaussian initial": methods.construct(suite, seed=0, at=1, init="gaussian")[0],
        "gaussian": methods.construct(suite, seed=0, init="gaussian")[0],
        "real": methods.real_inputs(suite, suite.anchors),
    }
    payload: dict[str, Any] = {
        "suite": suite.name,
        "pretrained": suite.score(suite.pretrained, "test"),
        "experts": suite.score_experts("test"),
        **{kind: {} for kind in inputs},
    }
    for index, task in enumerate(suite.tasks):
        for kind, layers in inputs.items():
            own = [layer[index] for layer in layers]
            payload[kind][task] = alone(suite, task, own)
            print(f"{task} from its {kind} alone: {100 * payload[kind][task]:.1f}", flush=True)
    print(f"recorded in {write_json(f'quality-alone-{suite.name}', payload)}")


if __name__ == "__main__":
    main()
