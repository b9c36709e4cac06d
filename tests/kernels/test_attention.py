import pytest
import torch

from fda_fast.kernels import attention
from fda_fast.ops.attention import Heads
from fda_fast.ops.reference import attention as twin

HEADS = {
    "plain": Heads(2, 2, 16, 0.25),
    "odd size": Heads(1, 1, 20, 0.2),
    "grouped": Heads(4, 2, 16, 0.25),
    "causal": Heads(2, 1, 16, 0.25, causal=True),
    "window": Heads(1, 1, 16, 0.25, causal=True, window=3),
}


def sweeps(module, heads, rope=None):
    """One evaluation as a function of its tensors, so that ``hold`` can compare two modules."""

    def run(x, dx, g, t, S, b):
        cast = rope if rope is None else tuple(table.to(x.dtype) for table in rope)
        y, dy, later = module.forward(x, dx, heads, rope=cast)
        out = (y, dy, later.backward(g), later.tangent(t), *later.reverse(S, b, True))
        _, _, adaptation = module.forward(x, dx, heads, rope=cast)
        return (*out, adaptation.adjoint(b))

    run.__module__, run.__name__ = module.__name__, "sweeps"
    return run


@pytest.fixture
def case(draw):
    def make(n, tokens, heads, ratio=1e-2, scale=1.0):
        x, t = (draw(n, tokens, heads.packed, scale=scale) for _ in range(2))
        width = heads.query * heads.size
        g, S, b = (draw(n, tokens, width) for _ in range(3))
        return x, x * draw(n, tokens, heads.packed, scale=ratio), g, t, S, b

    return make


@pytest.mark.parametrize("name", HEADS)
def test_kinds_of_heads(name, hold, case):
    heads = HEADS[name]
    hold(sweeps(attention, heads), sweeps(twin, heads), *case(1, 5, heads))


@pytest.mark.parametrize("tokens", [1, 16, 17, 33])
def test_blocks(tokens, hold, case):
    heads = Heads(1, 1, 16, 0.25)
    hold(sweeps(attention, heads), sweeps(twin, heads), *case(1, tokens, heads))


@pytest.mark.parametrize(("ratio", "scale"), [(1e-4, 1.0), (0.0, 1.0), (1.0, 2.0), (5.0, 3.0)])
def test_sizes_of_the_difference(ratio, scale, hold, case):
    """The last one moves scores by more than 20, where the plain difference takes over."""
    heads = Heads(1, 1, 16, 1.0)
    hold(sweeps(attention, heads), sweeps(twin, heads), *case(1, 7, heads, ratio, scale))


@pytest.mark.parametrize("rotary", [16, 8])
def test_rotary(rotary, hold, case, generator):
    heads = Heads(2, 1, 16, 0.25, causal=True)
    angles = torch.rand(6, rotary, generator=generator) * 6
    rope = (angles.cos(), angles.sin())
    hold(sweeps(attention, heads, rope), sweeps(twin, heads, rope), *case(1, 6, heads))


def test_without_b(hold, case):
    heads = HEADS["plain"]

    def run(module):
        def reverse(x, dx, g, t, S, b):
            _, _, later = module.forward(x, dx, heads)
            later.backward(g)
            later.tangent(t)
            return later.reverse(S, b, False)

        return reverse

    hold(run(attention), run(twin), *case(1, 4, heads))


def test_other_layouts_go_to_the_twin(case):
    capped = Heads(2, 2, 16, 0.25, softcap=10.0)
    x, dx, *_ = case(1, 4, capped)
    _, _, later = attention.forward(x.float(), dx.float(), capped)
    assert isinstance(later, twin.Sweeps)
    _, dy, later = attention.forward(x.float(), None, HEADS["plain"])
    assert dy is None and isinstance(later, twin.Sweeps)
