"""Feature similarity: the twin against autograd, every backend against the twin."""

import pytest
import torch
import torch.nn.functional as F
from sweeps import check, draw

from fda_fast.ops import similarity
from fda_fast.ops.reference import similarity as twin
from fda_fast.testing import relative_error

KINDS = ["cosine", "l2", "l1"]
# From width 2 on: below, the cosine is a sign, and its derivative exactly zero.
SHAPES = [(1, 1, 2), (2, 3, 5), (3, 4, 1027), (1, 2, 70_001), (2, 0, 4)]


def plain(kind, y, y_f):
    """s [K] of y, y_f [K, A, D]."""
    if kind == "cosine":
        return F.cosine_similarity(y, y_f, dim=-1).mean(1)
    if kind == "l2":
        return -(y - y_f).square().mean((1, 2))
    return -(y - y_f).abs().mean((1, 2))


def draw_all(generator, shape, ratio=1e-2):
    y = draw(generator, *shape)
    return y, draw(generator, *shape) * ratio, draw(generator, *shape)


@pytest.mark.parametrize("kind", KINDS)
def test_twin_is_autograd(kind, generator):
    y, dy, t = (v.double() for v in draw_all(generator, (2, 3, 7), ratio=0.5))
    a, b = y.clone().requires_grad_(), (y + dy).requires_grad_()
    s = plain(kind, a, b)
    (g,) = torch.autograd.grad(s.sum(), a, create_graph=True)
    out_s, out_g = twin.forward(kind, y, dy, 1.0)
    torch.testing.assert_close(out_s, s.detach())
    torch.testing.assert_close(out_g, g.detach())
    S, out_b = twin.reverse(kind, y, dy, t, 1.0)
    if kind == "l1":
        assert not S.any() and not out_b.any()
        return
    by_a, by_b = torch.autograd.grad((g * t).sum(), [a, b])
    torch.testing.assert_close(out_b, by_b)
    torch.testing.assert_close(S, by_a + by_b, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [1.0, 1e-2])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e5])
def test_sweeps(kind, ratio, scale, backend, device, generator):
    for shape in SHAPES:
        y, dy, t = draw_all(generator, shape, ratio)
        y, dy = y * scale, dy * scale
        anchors = max(shape[1], 1)
        if shape[1]:
            check(similarity.forward, twin.forward, (kind, y, dy, anchors), backend, device)
            check(similarity.reverse, twin.reverse, (kind, y, dy, t, 1.0), backend, device)


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_differences_keep_full_precision(ratio, backend, device, generator):
    y, dy, t = draw_all(generator, (2, 5, 4001), ratio)
    gold_g = twin.forward("cosine", y.double(), dy.double(), 5.0)[1]
    gold = twin.reverse("cosine", y.double(), dy.double(), t.double(), 5.0)
    y, dy, t = (v.to(device) for v in (y, dy, t))
    assert relative_error(similarity.forward("cosine", y, dy, 5.0, backend=backend)[1], gold_g) < (
        2e-7
    )
    S, b = similarity.reverse("cosine", y, dy, t, 5.0, backend=backend)
    assert relative_error(S, gold[0]) < 3e-7
    assert relative_error(b, gold[1]) < 3e-7


def test_zero_output_is_floored(backend, device):
    """An anchor whose output is zero has similarity 0, as F.cosine_similarity gives, not NaN."""
    y = torch.zeros(1, 2, 3, device=device)
    dy = torch.ones(1, 2, 3, device=device)
    s, g = similarity.forward("cosine", y, dy, 2.0, backend=backend)
    assert s.tolist() == [0.0]
    expected = twin.forward("cosine", y.double().cpu(), dy.double().cpu(), 2.0)[1]
    torch.testing.assert_close(g.cpu().double(), expected, rtol=1e-5, atol=0)
