import pytest

from fda_fast.kernels import activation
from fda_fast.ops.reference import activation as twin

KINDS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
# Around the block of 1024 (512 in the reverse sweep), and none at all.
SIZES = [0, 1, 512, 777, 1023, 1024, 1025]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_sweeps(kind, size, hold, draw):
    x, g, t, S, b = (draw(1, size, scale=2.0) for _ in range(5))
    dx = x * draw(1, size, scale=1e-2)
    hold(activation.forward, twin.forward, kind, x, dx)
    hold(activation.backward, twin.backward, kind, x, g)
    hold(activation.reverse, twin.reverse, kind, x, dx, g, t, S, b, True)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_terms(kind, hold, draw):
    x, dx, g, t, S, b = (draw(3, 259) for _ in range(6))
    hold(activation.forward, twin.forward, kind, x, None)
    hold(activation.tangent, twin.tangent, kind, x, t)
    hold(activation.adjoint, twin.adjoint, kind, x, dx, b)
    hold(activation.adjoint, twin.adjoint, kind, x, None, b)
    for dx_, g_, t_, need_b in [(None, g, t, True), (dx, None, t, False), (dx, g, None, False)]:
        hold(activation.reverse, twin.reverse, kind, x, dx_, g_, t_, S, b, need_b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-20, 30.0, 1e4])
def test_magnitudes(kind, scale, hold, draw):
    x, dx, g, t, S, b = (draw(1, 300) for _ in range(6))
    hold(activation.forward, twin.forward, kind, x * scale, dx * scale)
    hold(activation.reverse, twin.reverse, kind, x * scale, dx * scale, g, t, S, b, True)
