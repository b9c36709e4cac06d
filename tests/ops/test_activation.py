"""Activations: the twin against autograd, every backend against the twin, tiny differences."""

import pytest
import torch
import torch.nn.functional as F
from sweeps import check, draw, reverse_by_autograd

from fda_fast.errors import InputError
from fda_fast.ops import activation
from fda_fast.ops.reference import activation as twin
from fda_fast.testing import GuardedView, relative_error

PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}
KINDS = [*PLAIN]
SHAPES = [(1,), (3, 5), (0, 7), (2, 1, 17), (1, 1023), (1025,), (3, 777)]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def seven(generator, shape, ratio=1e-2, spread=3.0):
    """x, dx, g, t, S, b as in a construction step: S and g are as small as the difference."""
    x = draw(generator, *shape, scale=spread)
    dx = draw(generator, *shape) * x.abs() * ratio
    g, t, S, b = (draw(generator, *shape) for _ in range(4))
    return x, dx, g * ratio, t, S * ratio, b


def test_twin_is_autograd(kind, generator):
    x, dx, g, t, S, b = (v.double() for v in seven(generator, (301,), ratio=0.3))
    f = PLAIN[kind]
    y, dy = twin.forward(kind, x, dx)
    torch.testing.assert_close(y, f(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dy, f(x + dx) - f(x), rtol=1e-12, atol=1e-12)
    S_x, b_x = reverse_by_autograd(f, x, dx, g, t, S, b)
    out = twin.reverse(kind, x, dx, g, t, S, b, True)
    torch.testing.assert_close(out[0], S_x, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out[1], b_x, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(twin.adjoint(kind, x, dx, b), b_x, rtol=1e-11, atol=1e-12)
    _, g_x = reverse_by_autograd(f, x, 0 * dx, g, 0 * t, S, g)
    torch.testing.assert_close(twin.backward(kind, x, g), g_x, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(twin.tangent(kind, x, g), g_x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("spread", [1e-20, 1.0, 30.0])
def test_sweeps(kind, spread, backend, device, generator):
    for shape in SHAPES:
        x, dx, g, t, S, b = seven(generator, shape, spread=spread)
        for function, reference, arguments in [
            (activation.forward, twin.forward, (kind, x, dx)),
            (activation.forward, twin.forward, (kind, x, None)),
            (activation.backward, twin.backward, (kind, x, g)),
            (activation.tangent, twin.tangent, (kind, x, t)),
            (activation.adjoint, twin.adjoint, (kind, x, dx, b)),
            (activation.adjoint, twin.adjoint, (kind, x, None, b)),
            (activation.reverse, twin.reverse, (kind, x, dx, g, t, S, b, True)),
            (activation.reverse, twin.reverse, (kind, x, dx, g, t, S, b, False)),
            (activation.reverse, twin.reverse, (kind, x, None, g, None, S, b, True)),
            (activation.reverse, twin.reverse, (kind, x, dx, None, t, S, b, True)),
        ]:
            check(function, reference, arguments, backend, device)


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_differences_keep_full_precision(kind, ratio, backend, device, generator):
    """Relative error of dy and S_x at the level of float32 rounding, however small dx / x is."""
    if backend == "torch":
        pytest.skip("the twin subtracts; it is the baseline")
    values = seven(generator, (20_001,), ratio=ratio)
    gold_y = twin.forward(kind, *(v.double() for v in values[:2]))[1]
    gold = twin.reverse(kind, *(v.double() for v in values), True)[0]
    values = [v.to(device) for v in values]
    dy = activation.forward(kind, *values[:2], backend=backend)[1]
    S_x = activation.reverse(kind, *values, True, backend=backend)[0]
    assert relative_error(dy, gold_y) < 2e-7
    assert relative_error(S_x, gold) < 3e-7


def test_extreme_values(kind, backend, device):
    """Neither overflow inside nor a wrong limit: huge, infinite and NaN inputs."""
    if backend == "torch":
        pytest.skip("the twin's powers of x overflow")
    big = torch.tensor([1e5, 1e18, 3e38, -1e5, -1e18, -3e38, 0.0, -0.0], device=device)
    y, dy = activation.forward(kind, big, torch.zeros_like(big), backend=backend)
    expected = big.clamp_min(0)
    torch.testing.assert_close(y, expected)
    assert bool((dy == 0).all())
    slope = activation.backward(kind, big[:6], torch.ones_like(big[:6]), backend=backend)
    torch.testing.assert_close(slope, (big[:6] > 0).float())
    odd = torch.tensor([torch.nan, torch.inf], device=device)
    y, _ = activation.forward(kind, odd, None, backend=backend)
    assert y[0].isnan() and y[1] == torch.inf


def test_large_differences(kind, backend, device, generator):
    """dx as large as x or larger, signs crossing: the differences are those of two values."""
    x, y = draw(generator, 4001, scale=4.0), draw(generator, 4001, scale=4.0)
    b = draw(generator, 4001)
    zeros = torch.zeros_like(x)
    check(activation.forward, twin.forward, (kind, x, y - x), backend, device)
    arguments = (kind, x, y - x, zeros, zeros, zeros, b, True)
    check(activation.reverse, twin.reverse, arguments, backend, device)


def test_nothing_outside_the_outputs_is_written(kind, backend, generator, monkeypatch):
    if backend != "cpu":
        pytest.skip("the C++ backend writes through raw pointers")
    from fda_fast.ops.native import activation as native

    guards = []

    def guarded_empty_like(x):
        guards.append(GuardedView(torch.full_like(x, torch.nan)))
        return guards[-1].tensor

    monkeypatch.setattr(native, "empty_like", guarded_empty_like)
    for size in (1, 7, 1023, 1024, 1025, 5000):
        values = seven(generator, (size,))
        native.forward(kind, *values[:2])
        native.backward(kind, *values[:2])
        native.reverse(kind, *values, True)
    assert len(guards) == 6 * 5
    for guard in guards:
        guard.check()
        assert bool(guard.tensor.isfinite().all())


def test_threads_do_not_change_the_result(backend, generator):
    if backend != "cpu":
        pytest.skip("threads are those of the CPU")
    values = seven(generator, (150_001,))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(activation.reverse("gelu", *values, True, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_tensors_are_refused(backend):
    if backend != "cpu":
        pytest.skip("the C++ backend reads raw pointers")
    x = torch.zeros(4, 6)
    with pytest.raises(InputError, match=r"g: expected contiguous torch.float32 of shape \[4, 6\]"):
        activation.backward("silu", x, torch.zeros(4, 5), backend=backend)
    with pytest.raises(InputError, match=r"g: .*strides \(1, 4\)"):
        activation.backward("silu", x, torch.zeros(6, 4).T, backend=backend)
    with pytest.raises(InputError, match="activation kind: expected one of"):
        activation.backward("swish", x, x, backend=backend)
