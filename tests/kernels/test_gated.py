import pytest

from fda_fast.kernels import gated
from fda_fast.ops.reference import gated as twin

KINDS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")
WIDTHS = [0, 1, 511, 512, 513, 777]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_sweeps(kind, width, hold, draw):
    x, t = (draw(1, 2, 2 * width, scale=2.0) for _ in range(2))
    g, S, b = (draw(1, 2, width) for _ in range(3))
    dx = x * draw(1, 2, 2 * width, scale=1e-2)
    hold(gated.forward, twin.forward, kind, x, dx)
    hold(gated.backward, twin.backward, kind, x, g)
    hold(gated.tangent, twin.tangent, kind, x, t)
    hold(gated.adjoint, twin.adjoint, kind, x, dx, b)
    hold(gated.reverse, twin.reverse, kind, x, dx, g, t, S, b, True)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_absent_terms(kind, hold, draw):
    x, dx, t = (draw(2, 3, 2 * 131) for _ in range(3))
    g, S, b = (draw(2, 3, 131) for _ in range(3))
    hold(gated.forward, twin.forward, kind, x, None)
    hold(gated.adjoint, twin.adjoint, kind, x, None, b)
    for dx_, g_, t_, need_b in [(None, g, t, True), (dx, None, t, False), (dx, g, None, False)]:
        hold(gated.reverse, twin.reverse, kind, x, dx_, g_, t_, S, b, need_b)


@pytest.mark.parametrize("scale", [1e-12, 30.0])
def test_magnitudes(scale, hold, draw):
    x, dx, t = (draw(1, 2, 2 * 200, scale=scale) for _ in range(3))
    g, S, b = (draw(1, 2, 200) for _ in range(3))
    hold(gated.forward, twin.forward, "silu", x, dx)
    hold(gated.reverse, twin.reverse, "silu", x, dx, g, t, S, b, True)
