"""Gated activations: the twin against autograd, every backend against the twin."""

import pytest
import torch
from sweeps import check, draw, reverse_by_autograd
from test_activation import KINDS, PLAIN

from fda_fast.errors import InputError
from fda_fast.ops import gated
from fda_fast.ops.reference import gated as twin
from fda_fast.testing import relative_error

SHAPES = [(1, 1, 2), (2, 3, 10), (2, 0, 8), (1, 2, 2 * 1024), (2, 3, 2 * 1031)]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def seven(generator, shape, ratio=1e-2, spread=2.0):
    single = (*shape[:-1], shape[-1] // 2)
    x = draw(generator, *shape, scale=spread)
    dx = draw(generator, *shape) * x.abs() * ratio
    t = draw(generator, *shape)
    g, S, b = (draw(generator, *single) for _ in range(3))
    return x, dx, g * ratio, t, S * ratio, b


def test_twin_is_autograd(kind, generator):
    x, dx, g, t, S, b = (v.double() for v in seven(generator, (2, 5, 14), ratio=0.3))

    def f(x):
        gate, up = x.chunk(2, -1)
        return PLAIN[kind](gate) * up

    y, dy = twin.forward(kind, x, dx)
    torch.testing.assert_close(y, f(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dy, f(x + dx) - f(x), rtol=1e-11, atol=1e-12)
    S_x, b_x = reverse_by_autograd(f, x, dx, g, t, S, b)
    out = twin.reverse(kind, x, dx, g, t, S, b, True)
    torch.testing.assert_close(out[0], S_x, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out[1], b_x, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(twin.adjoint(kind, x, dx, b), b_x, rtol=1e-11, atol=1e-12)
    g_x = twin.backward(kind, x, g)
    torch.testing.assert_close((g_x * t).sum(), (g * twin.tangent(kind, x, t)).sum())
    _, expected = reverse_by_autograd(f, x, 0 * dx, g, 0 * t, S, g)
    torch.testing.assert_close(g_x, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("spread", [1e-15, 1.0, 20.0])
def test_sweeps(kind, spread, backend, device, generator):
    for shape in SHAPES:
        x, dx, g, t, S, b = seven(generator, shape, spread=spread)
        for function, reference, arguments in [
            (gated.forward, twin.forward, (kind, x, dx)),
            (gated.forward, twin.forward, (kind, x, None)),
            (gated.backward, twin.backward, (kind, x, g)),
            (gated.tangent, twin.tangent, (kind, x, t)),
            (gated.adjoint, twin.adjoint, (kind, x, dx, b)),
            (gated.adjoint, twin.adjoint, (kind, x, None, b)),
            (gated.reverse, twin.reverse, (kind, x, dx, g, t, S, b, True)),
            (gated.reverse, twin.reverse, (kind, x, dx, g, t, S, b, False)),
            (gated.reverse, twin.reverse, (kind, x, None, None, t, S, b, True)),
        ]:
            check(function, reference, arguments, backend, device)


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_differences_keep_full_precision(kind, ratio, backend, device, generator):
    if backend == "torch":
        pytest.skip("the twin subtracts; it is the baseline")
    values = seven(generator, (2, 10, 2 * 501), ratio=ratio)
    gold_y = twin.forward(kind, *(v.double() for v in values[:2]))[1]
    gold = twin.reverse(kind, *(v.double() for v in values), True)[0]
    values = [v.to(device) for v in values]
    dy = gated.forward(kind, *values[:2], backend=backend)[1]
    S_x = gated.reverse(kind, *values, True, backend=backend)[0]
    assert relative_error(dy, gold_y) < 2e-7
    assert relative_error(S_x, gold) < 3e-7


def test_odd_width_is_refused(backend):
    if backend != "cpu":
        pytest.skip("checked by the C++ backend")
    with pytest.raises(InputError, match=r"an even last dimension, \[gate | up\], got \[2, 5\]"):
        gated.forward("silu", torch.zeros(2, 5), None, backend=backend)
