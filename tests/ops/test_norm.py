"""LayerNorm and RMSNorm: the twin against autograd, every backend against the twin."""

import pytest
import torch
from sweeps import check, draw, reverse_by_autograd

from fda_fast.ops import norm
from fda_fast.ops.reference import norm as twin
from fda_fast.testing import relative_error

EPS = 1e-5
# From width 3 on: below, the normalised row is a sign, and its derivative exactly zero.
SHAPES = [(1, 9, 3), (2, 3, 8), (3, 33, 17), (1, 65, 1025), (2, 0, 5)]


@pytest.fixture(params=["layer", "rms"])
def kind(request):
    return request.param


def draw_all(generator, shape, ratio=1e-2, offset=0.5):
    """Values of a construction step: x has a mean, S and g are as small as the difference."""
    K, _, d = shape
    x = draw(generator, *shape) + offset
    v = {name: draw(generator, *shape) for name in ("dx", "g", "t", "S", "b")}
    v |= {"x": x, "dx": v["dx"] * x.abs() * ratio, "g": v["g"] * ratio, "S": v["S"] * ratio}
    v |= {"w": 1 + 0.3 * draw(generator, d), "c": draw(generator, d)}
    v |= {name: draw(generator, K, d, scale=ratio) for name in ("tw", "tb")}
    v |= {name: draw(generator, K, d) for name in ("mw", "mb")}
    return v


def plain(kind, w, c):
    """Norm of [K, R, d] with weight and bias [d] or [K, 1, d], in plain torch."""

    def f(x):
        xc = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        return xc / (xc.square().mean(-1, keepdim=True) + EPS).sqrt() * w + c

    return f


def test_twin_is_autograd(kind, generator):
    v = {name: u.double() for name, u in draw_all(generator, (2, 3, 7), ratio=0.3).items()}
    x, dx, g, t, S, b, w, tw, mw = (v[n] for n in ("x", "dx", "g", "t", "S", "b", "w", "tw", "mw"))
    f = plain(kind, w, v["c"])
    f_f = plain(kind, w + tw[:, None], v["c"] + v["tb"][:, None])
    y, dy = twin.forward(kind, x, dx, w, v["c"], tw, v["tb"], EPS)
    torch.testing.assert_close(y, f(x))
    torch.testing.assert_close(dy, f_f(x + dx) - f(x))

    S_x, b_x = reverse_by_autograd(f, x, dx, g, t, S, b, f_f)
    # The tangent along M reaches x as well: <g, mw xh(x)>.
    moved = x.detach().requires_grad_()
    along = (g * plain(kind, mw[:, None], 0.0)(moved)).sum()
    S_x = S_x + torch.autograd.grad(along, moved)[0]
    out = twin.reverse(kind, x, dx, g, t, S, b, w, tw, mw, EPS, True)
    torch.testing.assert_close(out[0], S_x, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(out[1], b_x, rtol=1e-10, atol=1e-11)

    tuned_w, tuned_c = (w + tw[:, None]).requires_grad_(), (v["c"] + v["tb"][:, None])
    tuned_c.requires_grad_()
    grads = torch.autograd.grad(plain(kind, tuned_w, tuned_c)(x + dx), [tuned_w, tuned_c], b)
    out = twin.adjoint(kind, x, dx, b, w, tw, EPS, True, True, True)
    torch.testing.assert_close(out[0], b_x, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(out[1], grads[0].squeeze(1), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(out[2], grads[1].squeeze(1), rtol=1e-10, atol=1e-11)

    _, Jt = torch.autograd.functional.jvp(f, x, t)
    t_y = Jt + plain(kind, mw[:, None], 0.0)(x) + v["mb"][:, None]
    torch.testing.assert_close(twin.tangent(kind, x, t, w, mw, v["mb"], EPS), t_y)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_sweeps(kind, scale, backend, device, generator):
    for shape in SHAPES:
        v = draw_all(generator, shape)
        x, dx, g, t, S, b = (v[n] for n in ("x", "dx", "g", "t", "S", "b"))
        x, dx = x * scale, dx * scale
        w, c, tw, tb, mw, mb = (v[n] for n in ("w", "c", "tw", "tb", "mw", "mb"))
        for function, reference, arguments in [
            (norm.forward, twin.forward, (kind, x, dx, w, c, tw, tb, EPS)),
            (norm.forward, twin.forward, (kind, x, None, w, None, tw, None, EPS)),
            (norm.forward, twin.forward, (kind, x, None, None, None, None, None, EPS)),
            (norm.forward, twin.forward, (kind, x, dx, None, None, None, None, EPS)),
            (norm.backward, twin.backward, (kind, x, g, w, EPS, True, True, True)),
            (norm.backward, twin.backward, (kind, x, g, None, EPS, True, False, False)),
            (norm.backward, twin.backward, (kind, x, g, w, EPS, False, True, False)),
            (norm.tangent, twin.tangent, (kind, x, t, w, mw, mb, EPS)),
            (norm.tangent, twin.tangent, (kind, x, None, w, mw, None, EPS)),
            (norm.tangent, twin.tangent, (kind, x, None, w, None, None, EPS)),
            (norm.reverse, twin.reverse, (kind, x, dx, g, t, S, b, w, tw, mw, EPS, True)),
            (norm.reverse, twin.reverse, (kind, x, None, g, None, S, b, w, tw, mw, EPS, True)),
            (norm.reverse, twin.reverse, (kind, x, dx, g, t, S, b, None, None, None, EPS, False)),
            (norm.adjoint, twin.adjoint, (kind, x, dx, b, w, tw, EPS, True, True, True)),
            (norm.adjoint, twin.adjoint, (kind, x, None, b, w, tw, EPS, True, False, True)),
        ]:
            check(function, reference, arguments, backend, device)


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_differences_keep_full_precision(kind, ratio, backend, device, generator):
    """Relative error of dy, S_x and b_x at the level of float32, however small the difference."""
    v = draw_all(generator, (2, 40, 384), ratio=ratio)
    forward = [v[n] for n in ("x", "dx", "w", "c", "tw", "tb")]
    reverse = [v[n] for n in ("x", "dx", "g", "t", "S", "b", "w", "tw", "mw")]
    gold_dy = twin.forward(kind, *(u.double() for u in forward), EPS)[1]
    gold = twin.reverse(kind, *(u.double() for u in reverse), EPS, True)
    dy = norm.forward(kind, *(u.to(device) for u in forward), EPS, backend=backend)[1]
    out = norm.reverse(kind, *(u.to(device) for u in reverse), EPS, True, backend=backend)
    assert relative_error(dy, gold_dy) < 3e-7
    assert relative_error(out[0], gold[0]) < 5e-7
    assert relative_error(out[1], gold[1]) < 3e-7


def test_parameter_gradients_do_not_depend_on_threads(kind, backend, generator):
    if backend != "cpu":
        pytest.skip("threads are those of the CPU")
    v = draw_all(generator, (2, 500, 96))
    arguments = (kind, v["x"], v["g"], v["w"], EPS, True, True, True)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(norm.backward(*arguments, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_mean(backend, device, generator):
    """A mean a thousand times the spread: the variance is not lost in it."""
    x = draw(generator, 1, 7, 501) + 1000
    g = draw(generator, 1, 7, 501)
    arguments = ("layer", x, g, None, EPS, True, False, False)
    check(norm.backward, twin.backward, arguments, backend, device)
    dx = draw(generator, 1, 7, 501, scale=1e-3)
    arguments = ("layer", x, dx, None, None, None, None, EPS)
    check(norm.forward, twin.forward, arguments, backend, device)
