"""One adaptation step against rebuilding the merged weights through autograd, as published.

    python benchmarks/bench_adapt.py
    python benchmarks/bench_adapt.py --cases minilm --repeats 3

Both sides run the whole adaptation from the same start in the same order of anchors, at two
lengths; their difference gives the time of a step and leaves out what is done once. Beside each
time stands the distance of the adapted weights from a float64 run of the published loop, relative
to how far that run moved from its start.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from common import environment, ratio, summary, write_json
from torch import Tensor, nn
from transformers import BertConfig, RobertaConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer

from fda_fast import adapt

ANCHORS, TOKENS, BATCH, SHORT, LONG = 64, 5, 128, 1, 4


def roberta_base() -> nn.Module:
    config = RobertaConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    config._attn_implementation = "sdpa"
    return RobertaLayer(config).eval()


def minilm() -> nn.Module:
    config = BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    config._attn_implementation = "sdpa"
    return BertLayer(config).eval()


CASES = {"roberta_base": roberta_base, "minilm": minilm}
# Start -> number of coefficient sets; none trains the weights themselves.
STARTS = {"pretrained": 0, "merged": 1, "task_arithmetic": 8}


def make(case: str, tasks: int = 8) -> tuple[nn.Module, list[tuple[Tensor, nn.Module]]]:
    """A pretrained layer and ``tasks`` fine-tuned ones, 1 % away, with their anchors."""
    torch.manual_seed(0)
    pretrained = CASES[case]()
    width = next(p.shape[1] for p in pretrained.parameters() if p.dim() == 2)
    result = []
    for _ in range(tasks):
        layer = copy.deepcopy(pretrained)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(1e-2 * (p.norm() / p.numel() ** 0.5 + 1e-3) * torch.randn_like(p))
        result.append((torch.randn(ANCHORS, TOKENS, width), layer))
    return pretrained, result


def starting(tasks: list[tuple[Tensor, nn.Module]], sets: int) -> list[tuple[nn.Module, float]]:
    if sets == 1:
        return [(tasks[0][1], 1.0)]
    return [(layer, 0.3) for _, layer in tasks[:sets]]


def ours(
    pretrained: nn.Module, tasks: list[tuple[Tensor, nn.Module]], sets: int, epochs: int
) -> dict[str, Tensor]:
    extra = {} if sets == 0 else {"mode": "coefficients", "start": starting(tasks, sets)}
    got = adapt(pretrained, tasks, epochs=epochs, batch_size=BATCH, distance="l2", **extra)
    return {name: p.detach() for name, p in got.layer.named_parameters()}


def published(
    pretrained: nn.Module, tasks: list[tuple[Tensor, nn.Module]], sets: int, epochs: int
) -> dict[str, Tensor]:
    """The published adaptation: merged weights rebuilt in the graph, Adam on every alpha."""
    base = {name: p.detach() for name, p in pretrained.named_parameters()}
    if sets == 0:
        weights = {name: p.clone().requires_grad_() for name, p in base.items()}
        trained, lr = list(weights.values()), 1e-5
    else:
        start = starting(tasks, sets)
        vectors = [
            {name: p.detach() - base[name] for name, p in layer.named_parameters()}
            for layer, _ in start
        ]
        alphas = [
            {name: torch.full_like(v, scale).requires_grad_() for name, v in vector.items()}
            for vector, (_, scale) in zip(vectors, start, strict=True)
        ]
        trained, lr = [a for group in alphas for a in group.values()], 1e-2

    def merged() -> dict[str, Tensor]:
        if sets == 0:
            return weights
        return {
            name: base[name] + sum(a[name] * v[name] for a, v in zip(alphas, vectors, strict=True))
            for name in base
        }

    optimizer = torch.optim.Adam(trained, lr=lr)
    x = torch.cat([anchors for anchors, _ in tasks])
    with torch.no_grad():
        y = torch.cat([_first(layer(anchors)) for anchors, layer in tasks])
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            out = _first(torch.func.functional_call(pretrained, merged(), (x[index],)))
            F.mse_loss(out.flatten(1), y[index].flatten(1), reduction="sum").backward()
            optimizer.step()
    return {name: w.detach() for name, w in merged().items()}


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def step_seconds(function, *args) -> float:
    """Seconds of one step: a long run minus a short one."""
    times = []
    for epochs in (SHORT, LONG):
        start = time.perf_counter()
        function(*args, epochs)
        times.append(time.perf_counter() - start)
    steps = (LONG - SHORT) * -(-8 * ANCHORS // BATCH)
    return (times[1] - times[0]) / steps


def distance(got: dict[str, Tensor], gold: dict[str, Tensor], moved: float) -> float:
    """How far the adapted weights are from the float64 run, relative to what that run moved."""
    return sum(float((got[n].double() - gold[n]).square().sum()) for n in gold) ** 0.5 / moved


def in_float64(pretrained: nn.Module, tasks: list[tuple[Tensor, nn.Module]]):
    double = [(x.double(), copy.deepcopy(layer).double()) for x, layer in tasks]
    return copy.deepcopy(pretrained).double(), double


def run(case: str, start: str, repeats: int) -> dict[str, object]:
    pretrained, tasks = make(case)
    sets = STARTS[start]
    wide = in_float64(pretrained, tasks)
    before, gold = published(*wide, sets, 0), published(*wide, sets, LONG)
    moved = distance(before, gold, 1.0)
    functions = {"published": published, "fda_fast": ours}
    errors = {
        name: distance(function(pretrained, tasks, sets, LONG), gold, moved)
        for name, function in functions.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(step_seconds(function, pretrained, tasks, sets))
    return {
        "case": case,
        "start": start,
        "coefficient_sets": sets,
        "speedup": ratio(seconds, "published", "fda_fast"),
        "rows": [
            {"engine": name, **summary(seconds[name]), "weights_error": errors[name]}
            for name in functions
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for case in arguments.cases:
        for start in STARTS:
            rows.append(run(case, start, arguments.repeats))
            for row in rows[-1]["rows"]:
                print(
                    f"{case:14s} {start:16s} {row['engine']:10s} {row['ms_median']:9.1f} ms"
                    f"   error {row['weights_error']:.1e}"
                )
            print(f"{'':31s} {rows[-1]['speedup']}x")
    print(environment())
    print(write_json("adapt", {"rows": rows}))


if __name__ == "__main__":
    main()
