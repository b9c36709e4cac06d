"""Every operation of a step, PyTorch twin against C++, on the CPU.

    python benchmarks/bench_ops.py                       table, and results/<cpu>/ops.json
    pytest benchmarks/bench_ops.py -k gelu --benchmark-group-by=param:case

One ViT-B/32 block's sizes: 64 anchors of 50 tokens, width 768. Correctness is held by tests/ops.
The script runs one thread and counts its own processor time, interleaved, so that neighbours on
the machine hardly matter.
"""

import time

import pytest
import torch

from fda_fast import _native
from fda_fast.ops import activation, adamw, alignment, coefficients, dispatch, gated, norm
from fda_fast.ops import attention as attention_op
from fda_fast.ops import similarity as similarity_op

TASKS, ANCHORS, TOKENS, WIDTH = 1, 64, 50, 768
ROWS = ANCHORS * TOKENS
WIDE = 3072
EPS = 1e-5
BACKENDS = ["torch", "cpu"]


def draw(*shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * scale


def elementwise_cases():
    x, dx = draw(TASKS, ROWS, WIDE), draw(TASKS, ROWS, WIDE, scale=1e-2)
    g, t, S, b = (draw(TASKS, ROWS, WIDE) for _ in range(4))
    for kind in activation.KINDS:
        yield f"{kind} forward", lambda to, k=kind: activation.forward(k, x, dx, backend=to)
        yield f"{kind} backward", lambda to, k=kind: activation.backward(k, x, g, backend=to)
        yield (
            f"{kind} reverse",
            lambda to, k=kind: activation.reverse(k, x, dx, g, t, S, b, True, backend=to),
        )


def gated_cases():
    x, dx, t = (draw(TASKS, ROWS, 2 * WIDTH) for _ in range(3))
    dx = dx * 1e-2
    g, S, b = (draw(TASKS, ROWS, WIDTH) for _ in range(3))
    yield "swiglu forward", lambda to: gated.forward("silu", x, dx, backend=to)
    yield "swiglu backward", lambda to: gated.backward("silu", x, g, backend=to)
    yield "swiglu tangent", lambda to: gated.tangent("silu", x, t, backend=to)
    yield (
        "swiglu reverse",
        lambda to: gated.reverse("silu", x, dx, g, t, S, b, True, backend=to),
    )


def norm_cases():
    x, g, t, S, b = (draw(TASKS, ROWS, WIDTH) for _ in range(5))
    dx, w, c = x * 1e-2, draw(WIDTH), draw(WIDTH)
    tw, tb, mw, mb = (draw(TASKS, WIDTH) for _ in range(4))
    for kind in ("layer", "rms"):
        yield (
            f"{kind} norm forward",
            lambda to, k=kind: norm.forward(k, x, dx, w, c, tw, tb, EPS, backend=to),
        )
        yield (
            f"{kind} norm backward",
            lambda to, k=kind: norm.backward(k, x, g, w, EPS, True, True, True, backend=to),
        )
        yield (
            f"{kind} norm tangent",
            lambda to, k=kind: norm.tangent(k, x, t, w, mw, mb, EPS, backend=to),
        )
        yield (
            f"{kind} norm reverse",
            lambda to, k=kind: norm.reverse(k, x, dx, g, t, S, b, w, tw, mw, EPS, True, backend=to),
        )


def similarity_cases():
    y, t = (draw(TASKS, ANCHORS, TOKENS * WIDTH) for _ in range(2))
    dy = y * 1e-2 + draw(TASKS, ANCHORS, TOKENS * WIDTH, scale=1e-2)
    forward, reverse = similarity_op.forward, similarity_op.reverse
    yield "cosine forward", lambda to: forward("cosine", y, dy, 64.0, backend=to)
    yield "cosine reverse", lambda to: reverse("cosine", y, dy, t, 64.0, backend=to)


def alignment_cases():
    g, u, v = (draw(TASKS, ROWS, 3 * WIDTH) for _ in range(3))
    widths = [WIDTH] * 3
    alpha, beta, row = draw(TASKS, 3), draw(TASKS, 3), draw(TASKS, 3 * WIDTH)
    yield "dots", lambda to: alignment.dots(g, u, v, widths, backend=to)
    yield "mix", lambda to: alignment.mix(alpha, u, beta, v, widths, row, backend=to)


def optimizer_cases():
    x, g, avg, best = (draw(TASKS, ROWS, WIDTH) for _ in range(4))
    avg_sq, loss = g.square(), draw(TASKS)

    def step(to):
        best_loss = torch.full((TASKS,), torch.inf)
        adamw.step_(x, g, avg, avg_sq, 9, loss, best_loss, best, 1e-2, backend=to)

    yield "adamw and best anchors", step
    alpha, tau = (draw(4, WIDTH, WIDE) for _ in range(2))
    grad, delta, alpha_avg = (draw(WIDTH, WIDE) for _ in range(3))
    alpha_avg_sq = alpha_avg.square()
    yield (
        "coefficients of 4 tasks",
        lambda to: coefficients.update_(
            alpha, tau, grad, alpha_avg, alpha_avg_sq, delta, 9, 1e-3, backend=to
        ),
    )


def attention_cases():
    heads = attention_op.Heads(query=12, key_value=12, size=64, scale=0.125)
    x, t = (draw(ANCHORS, TOKENS, heads.packed) for _ in range(2))
    dx = x * 1e-2
    g, S, b = (draw(ANCHORS, TOKENS, WIDTH) for _ in range(3))

    def sweeps(to):
        _, _, kept = attention_op.forward(x, dx, heads, backend=to)
        kept.backward(g)
        kept.tangent(t)
        return kept.reverse(S, b, True)

    yield "attention, four sweeps", sweeps


GROUPS = [
    elementwise_cases, gated_cases, norm_cases, similarity_cases, alignment_cases,
    optimizer_cases, attention_cases,
]  # fmt: skip
STEMS = {attention_cases: "attention"}
CASES = {name: (call, STEMS.get(group, "activation")) for group in GROUPS for name, call in group()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_op(benchmark, case, backend):
    call, stem = CASES[case]
    try:
        dispatch.implementation(stem, torch.zeros(1), backend)
    except RuntimeError as missing:
        pytest.skip(str(missing))
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(call, args=(backend,), rounds=5, warmup_rounds=1)


def main():
    from common import interleaved, ratio, summary, write_json

    torch.set_num_threads(1)
    rows = []
    for case, (call, _) in CASES.items():
        seconds = interleaved(
            {to: lambda to=to, call=call: call(to) for to in BACKENDS}, clock=time.process_time
        )
        row = {"case": case, "speedup": ratio(seconds, "torch", "cpu")}
        row |= {to: summary(seconds[to]) for to in BACKENDS}
        rows.append(row)
        twin, native = (row[to]["ms_median"] for to in BACKENDS)
        print(f"{case:26s} torch {twin:8.1f} ms   C++ {native:7.1f} ms   {row['speedup']:5.1f} x")
    isa = _native.load().isa()
    path = write_json("ops", {"threads": 1, "instruction_set": isa, "rows": rows})
    print("written:", path.name)


if __name__ == "__main__":
    main()
