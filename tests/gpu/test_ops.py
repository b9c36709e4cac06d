"""Every kernel on the card: real shapes, streams, graphs, repeatability."""

import pytest
import torch
from op_cases import STEMS, cases, convert, has, module, results

from fda_fast.ops import adamw, coefficients
from fda_fast.testing import assert_no_worse_than_torch


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def draw(device, dtype):
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)


@pytest.fixture(params=STEMS)
def stem(request, backend):
    if not has(request.param, backend):
        pytest.skip(f"{request.param} has no {backend} implementation")
    return request.param


def test_fidelity(stem, backend, draw, real):
    for run, arguments in cases(stem, draw, real):
        out = results(run(module(stem, backend), *arguments))
        twin = module(stem, "torch")
        gold = results(run(twin, *(convert(a, torch.float64) for a in arguments)))
        baseline = results(run(twin, *(convert(a, torch.float32) for a in arguments)))
        for o, g, b in zip(out, gold, baseline, strict=True):
            assert_no_worse_than_torch(o, g, b.to(o.dtype), name=stem)
            del g, b


def test_repeats_bit_for_bit(stem, backend, draw, real):
    for run, arguments in cases(stem, draw, real):
        first = results(run(module(stem, backend), *arguments))
        for _ in range(3):
            again = results(run(module(stem, backend), *arguments))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.card
def test_other_stream(stem, backend, draw, real):
    """Inputs arrive late on a side stream; a launch on another stream would read zeros."""
    for run, arguments in cases(stem, draw, real):
        expected = results(run(module(stem, backend), *arguments))
        late = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for to, value in zip(late, arguments, strict=True):
                if isinstance(value, torch.Tensor):
                    to.copy_(value)
            out = results(run(module(stem, backend), *late))
        torch.cuda.current_stream().wait_stream(stream)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.card
def test_captured_in_a_graph(stem, backend, draw, real):
    for run, arguments in cases(stem, draw, real):
        expected = results(run(module(stem, backend), *arguments))
        static = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        run(module(stem, backend), *static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = results(run(module(stem, backend), *static))
        for to, value in zip(static, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                to.copy_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.card
def test_second_device(stem, backend, draw, real):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for run, arguments in cases(stem, draw, real):
        expected = results(run(module(stem, backend), *arguments))
        moved = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in arguments]
        out = results(run(module(stem, backend), *moved))
        assert all(torch.equal(a.to("cuda:0"), b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("on_device", [False, True], ids=["host step", "device step"])
def test_optimisers(backend, device, real, on_device):
    generator = torch.Generator().manual_seed(0)
    shape, width = real((8, 3200, 768), (2, 3, 70)), real(13824 * 5120, 333)
    start = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(3)]
    losses = [torch.randn(shape[:1], generator=generator) for _ in range(3)]
    tau = torch.randn((2, width), generator=generator)

    def run(backend, place, dtype):
        def new(value):
            return value.to(place, dtype, copy=True)

        x, m, v, best = new(start), new(start * 0), new(start * 0), new(start)
        best_loss = torch.full(shape[:1], torch.inf, device=place, dtype=dtype)
        history = torch.zeros((2, shape[0]), device=place, dtype=dtype)
        alpha, avg, sq = new(tau * 0 + 1), new(tau[0] * 0), new(tau[0] * 0)
        delta = new(tau[0])
        for count, (g, loss) in enumerate(zip(grads, losses, strict=True), 1):
            step = torch.tensor(count, device=place) if on_device else count
            adamw.step_(x, new(g), m, v, step, new(loss), best_loss, best, 1e-2,
                        history=history, backend=backend)  # fmt: skip
            coefficients.update_(alpha, new(tau), new(tau[0] * count), avg, sq, delta, step, 1e-2,
                                 backend=backend)  # fmt: skip
        return x, best, best_loss, history, alpha, delta

    out = run(backend, device, torch.float32)
    gold = run("torch", device, torch.float64)
    baseline = run("torch", device, torch.float32)
    for o, g, b in zip(out, gold, baseline, strict=True):
        assert_no_worse_than_torch(o, g, b)
    again = run(backend, device, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
