"""Every CUDA C++ kernel against its torch twin, through the package's wrappers and bindings."""

import sys
from pathlib import Path

import pytest
import torch

from fda_fast.ops import adamw, alignment, coefficients
from fda_fast.ops.reference import alignment as alignment_twin
from fda_fast.testing import assert_no_worse_than_torch, poisoned_empty

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

# The tests of the operations, run on the emulated backend by the fixtures of this folder. Their
# tensors start at odd addresses.
from test_adamw import (  # noqa: F401
    test_best_is_of_the_anchors_before_their_update,
    test_history_is_a_ring,
    test_step_held_in_a_tensor,
)
from test_adamw import test_trajectory as test_adamw_trajectory  # noqa: F401
from test_alignment import (  # noqa: F401
    test_coefficients,
    test_constant_terms_and_floors,
    test_evaluate_is_dots_then_coefficients,
    test_segments,
)
from test_coefficients import test_trajectory as test_coefficients_trajectory  # noqa: F401

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, widths): single columns, whole and broken groups of four, more than a block of 256 threads,
# several chunks of 32768 elements, an empty segment, as many segments as there may be.
SHAPES = [
    (1, (1,)),
    (3, (4, 8, 12)),
    (3, (5, 7)),
    (2, (1028,)),
    (2, (1027, 1)),
    (70, (512, 1024)),
    (5, (0, 6)),
    (0, (4, 4)),
    (2, tuple(range(16))),
]


@pytest.fixture
def draw(generator):
    """``draw(dtype, offset, *shape)``: normal numbers, ``offset`` elements behind 64 bytes."""

    def draw(dtype, offset, *shape):
        values = torch.randn(shape, generator=generator).to(dtype)
        buffer = torch.empty(values.numel() + offset, dtype=dtype)
        return buffer[offset:].view(shape).copy_(values)

    return draw


def wide(*values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


def single(*values):
    return [v.float() if isinstance(v, torch.Tensor) else v for v in values]


def hold(function, twin, arguments):
    """The gate; the twin's own error is that of float32, rounded once to the storage type."""
    with poisoned_empty():
        out = function(*arguments, backend="cuda")
    gold = twin(*wide(*arguments))
    assert_no_worse_than_torch(out, gold, twin(*single(*arguments)).to(out.dtype))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize(("rows", "widths"), SHAPES)
def test_alignment(module, draw, dtype, offset, rows, widths):
    tasks, o = 2, sum(widths)
    g, u, v = (draw(dtype, offset, tasks, rows, o) for _ in range(3))
    hold(alignment.dots, alignment_twin.dots, (g, u, v, widths))
    # The columns of the weights out of those of all parameters, both kinds side by side.
    packed = draw(torch.float32, 0, 2, tasks, len(widths) + 3)[:, :, 1 : 1 + len(widths)]
    for row in (draw(dtype, offset, tasks, o), None):
        arguments = (packed[0], u, packed[1], v, widths, row)
        hold(alignment.mix, alignment_twin.mix, arguments)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(module, draw, order):
    g, u, v = (draw(torch.float32, 0, 2, 70, 1536) for _ in range(3))
    dots, squares = draw(torch.float32, 0, 2, 3, 40).abs(), draw(torch.float32, 0, 3, 40).abs()

    def run():
        found = alignment.dots(g, u, v, (512, 1024), backend="cuda")
        active = torch.arange(40) % 3 != 0
        return found, *alignment.coefficients(dots, squares, active, backend="cuda")

    in_order = run()
    module.choose_order(order)
    try:
        again = run()
    finally:
        module.choose_order(0)
    assert all(torch.equal(a, b) for a, b in zip(in_order, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [32, 33, 128])
def test_as_many_terms_as_there_may_be(module, draw, dtype, count):
    shapes = [(1 + p % 3, 4 * (p % 5) + (p % 2)) for p in range(count)]
    tensors = [[draw(dtype, p % 2, 2, *shape) for _ in range(2)] for p, shape in enumerate(shapes)]
    squares = torch.stack([T.float().square().sum((1, 2)) for _, T in tensors], dim=1)
    active = torch.ones(count, dtype=torch.bool)

    def run(backend, dtype):
        terms = [
            alignment.Term(G.to(dtype), T.to(dtype), G.to(dtype), [G.shape[2]], [p])
            for p, (G, T) in enumerate(tensors)
        ]
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        return alignment.evaluate(terms, squares.to(wanted), active, backend=backend)

    module.take_log()
    found = run("cuda", dtype)
    assert len(module.take_log()) == 1 + (count + 31) // 32
    gold, baseline = run("torch", torch.float64), run("torch", torch.float32)
    for o, g, b in zip(found, gold, baseline, strict=True):
        assert_no_worse_than_torch(o, g, b)


@pytest.mark.parametrize("terms", [1, 31, 32, 33, 100])
def test_terms_beyond_a_warp(module, draw, terms):
    square, squares = draw(torch.float32, 0, 3, terms).abs(), draw(torch.float32, 0, 3, terms).abs()
    dots = torch.stack([0.3 * (square * squares).sqrt(), square])
    active = torch.arange(terms) % 7 != 3
    out = alignment.coefficients(dots, squares, active, backend="cuda")
    gold = alignment_twin.coefficients(dots.double(), squares.double(), active, 1e-8)
    baseline = alignment_twin.coefficients(dots, squares, active, 1e-8)
    for o, g, b in zip(out, gold, baseline, strict=True):
        assert_no_worse_than_torch(o, g, b)


def test_not_a_number_reaches_the_loss(module):
    dots = torch.tensor([[[0.5, torch.nan]], [[1.0, 1.0]]])
    for bad in (dots, dots.flip(0)):
        active = torch.ones(2, dtype=torch.bool)
        loss, _, _ = alignment.coefficients(bad, torch.ones(1, 2), active, backend="cuda")
        assert bool(loss.isnan())


# Nothing at its default, so that no argument can stand in another's place.
SETTINGS = {"lr": 3e-2, "betas": (0.7, 0.95), "eps": 1e-3}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("on_device", [False, True], ids=["host step", "device step"])
@pytest.mark.parametrize("shape", [(3, 1028), (2, 5, 7), (300, 3)])
def test_optimisers(module, draw, offset, on_device, shape):
    start, delta = draw(torch.float32, 0, *shape), draw(torch.float32, 0, *shape[1:])
    grads = [draw(torch.float32, 0, *shape) for _ in range(3)]
    losses = [draw(torch.float32, 0, shape[0]) for _ in range(3)]

    def run(backend, dtype):
        def new(values):
            place = torch.empty(values.numel() + offset, dtype=dtype)
            return place[offset:].view(values.shape).copy_(values)

        x, m, v, best = new(start), new(start * 0), new(start * 0), new(start)
        best_loss = torch.full(shape[:1], torch.inf, dtype=dtype)
        history = torch.zeros((2, shape[0]), dtype=dtype)
        alpha, avg, sq, out = new(start), new(delta * 0), new(delta * 0), new(delta)
        for count, (g, loss) in enumerate(zip(grads, losses, strict=True), 1):
            step = torch.tensor(count) if on_device else count
            adamw.step_(x, new(g), m, v, step, new(loss), best_loss, best, weight_decay=0.3,
                        history=history, backend=backend, **SETTINGS)  # fmt: skip
            coefficients.update_(alpha, new(start + 1), new(delta), avg, sq, out, step,
                                 backend=backend, **SETTINGS)  # fmt: skip
        return x, m, v, best, best_loss, history, alpha, avg, sq, out

    for out, gold, baseline in zip(
        run("cuda", torch.float32), run("torch", torch.float64), run("torch", torch.float32),
        strict=True,
    ):  # fmt: skip
        assert_no_worse_than_torch(out, gold, baseline)
