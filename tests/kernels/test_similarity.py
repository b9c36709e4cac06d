import pytest
import torch

from fda_fast.kernels import similarity
from fda_fast.ops.reference import similarity as twin

KINDS = ("cosine", "l2", "l1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 37), (1, 2, 777), (2, 1, 1024), (1, 2, 1025), (1, 2, 9001)]
)
def test_sweeps(kind, shape, hold, draw):
    y, t = draw(*shape), draw(*shape)
    dy = y * draw(*shape, scale=1e-2)
    # A width of 1 has nothing but rounding: cos is exactly 1.
    if shape[-1] > 1 or kind != "cosine":
        hold(similarity.forward, twin.forward, kind, y, dy, float(shape[1]))
        hold(similarity.reverse, twin.reverse, kind, y, dy, t, float(shape[1]))


@pytest.mark.parametrize("scale", [1e-6, 1e-12, 1e6])
def test_magnitudes(scale, hold, draw):
    """1e-12: below the floor that cosine_similarity puts under each norm."""
    y, dy, t = draw(2, 3, 50, scale=scale), draw(2, 3, 50, scale=0.1 * scale), draw(2, 3, 50)
    hold(similarity.forward, twin.forward, "cosine", y, dy, 1.0)
    hold(similarity.reverse, twin.reverse, "cosine", y, dy, t, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_stay_finite(kind, draw):
    y = draw(1, 3, 40)
    dy = draw(1, 3, 40)
    y[:, 1], dy[:, 1] = 0, 0
    s, g = similarity.forward(kind, y, dy, 1.0)
    S, b = similarity.reverse(kind, y, dy, g, 1.0)
    assert all(bool(torch.isfinite(one).all()) for one in (s, g, S, b))


@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind, draw):
    y = draw(2, 3, 0)
    s, g = similarity.forward(kind, y, y, 1.0)
    assert s.tolist() == [0, 0] and g.shape == y.shape
    S, b = similarity.reverse(kind, y, y, g, 1.0)
    assert S.shape == b.shape == y.shape
