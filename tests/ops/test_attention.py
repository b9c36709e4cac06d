"""The attention op: every sweep against autograd in float64, and what low precision leaves."""

import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.ops import attention
from fda_fast.ops.attention import Heads
from fda_fast.ops.reference.attention import softmax_difference

CASES = {
    "multi-head": Heads(4, 4, 6, scale=6**-0.5),
    "grouped": Heads(6, 2, 4, scale=0.4),
    "single key head, causal": Heads(3, 1, 8, scale=0.3, causal=True),
    "causal window": Heads(4, 2, 4, scale=0.5, causal=True, window=3),
    "softcap": Heads(4, 2, 4, scale=1.0, causal=True, softcap=1.5),
    "one column": Heads(2, 2, 1, scale=1.0),
}


def rotate_half(u):
    a, b = u.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rope_tables(tokens, size, dtype=torch.float64):
    angle = torch.arange(tokens)[:, None] * (0.3 ** torch.arange(size // 2))
    angle = torch.cat([angle, angle], dim=-1).to(dtype)
    return angle.cos(), angle.sin()


def plain_attention(x, heads, rope=None):
    """The definition, written per head as Hugging Face does."""
    n, tokens, _ = x.shape
    x = x.view(n, tokens, -1, heads.size).transpose(1, 2)
    q, k, v = x.split([heads.query, heads.key_value, heads.key_value], dim=1)
    if rope is not None:
        r = rope[0].shape[1]
        q, k = (
            torch.cat(
                [u[..., :r] * rope[0] + rotate_half(u[..., :r]) * rope[1], u[..., r:]], dim=-1
            )
            for u in (q, k)
        )
    k = k.repeat_interleave(heads.query // heads.key_value, dim=1)
    v = v.repeat_interleave(heads.query // heads.key_value, dim=1)
    scores = q @ k.transpose(2, 3) * heads.scale
    if heads.softcap is not None:
        scores = heads.softcap * torch.tanh(scores / heads.softcap)
    if heads.causal:
        for i in range(tokens):
            for j in range(tokens):
                if j > i or (heads.window is not None and i - j >= heads.window):
                    scores[:, :, i, j] = -torch.inf
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def oracle(x, dx, g, t, S, b, function):
    """Every sweep by autograd."""
    x, g = x.clone().requires_grad_(), g.clone().requires_grad_()
    x_f = (x + dx).detach().requires_grad_()
    y, y_f = function(x), function(x_f)
    (g_x,) = torch.autograd.grad(y, x, g, create_graph=True)
    (b_x,) = torch.autograd.grad(y_f, x_f, b)
    (b_0,) = torch.autograd.grad(y, x, b, retain_graph=True)
    (S_0,) = torch.autograd.grad(y, x, S, retain_graph=True)
    # <J^T g, t> = <g, J t>: its derivative in g is J t.
    second, t_y = torch.autograd.grad((g_x * t).sum(), (x, g))
    return (
        y.detach(),
        (y_f - y).detach(),
        g_x.detach(),
        t_y,
        S_0 + b_x - b_0 + second,
        b_x,
    )


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


# A head of one column has no pair to rotate.
WITH_ROPE = [(case, r) for case in CASES for r in (None, "full", "part") if case != "one column"]


@pytest.mark.parametrize(("case", "rope"), [*WITH_ROPE, ("one column", None)])
def test_sweeps_equal_autograd(case, rope, draw):
    heads = CASES[case]
    n, tokens = 3, 5
    tables = None
    if rope:
        tables = rope_tables(tokens, heads.size if rope == "full" else heads.size // 2)
    x, dx, t = (draw(n, tokens, heads.packed) for _ in range(3))
    g, S, b = (draw(n, tokens, heads.query * heads.size) for _ in range(3))
    dx = 0.3 * dx
    want = oracle(x, dx, g, t, S, b, lambda x: plain_attention(x, heads, tables))
    y, dy, sweeps = attention.forward(x, dx, heads, rope=tables, backend="torch")
    got = [y, dy, sweeps.backward(g), sweeps.tangent(t), *sweeps.reverse(S, b, True)]
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 1e-10
    _, _, sweeps = attention.forward(x, dx, heads, rope=tables, backend="torch")
    assert relative(sweeps.adjoint(b), want[-1]) < 1e-10


def test_reverse_without_b(draw):
    heads = CASES["grouped"]
    _, _, sweeps = attention.forward(draw(2, 3, heads.packed), draw(2, 3, heads.packed), heads)
    sweeps.backward(draw(2, 3, 24))
    sweeps.tangent(draw(2, 3, heads.packed))
    assert sweeps.reverse(draw(2, 3, 24), draw(2, 3, 24), False)[1] is None


@pytest.mark.parametrize("case", ["grouped", "softcap"])
def test_no_difference_is_none(case, draw):
    heads = CASES[case]
    x, t = draw(3, 5, heads.packed), draw(3, 5, heads.packed)
    g, S, b = (draw(3, 5, heads.query * heads.size) for _ in range(3))
    results = []
    for dx in (None, torch.zeros_like(x)):
        y, dy, sweeps = attention.forward(x, dx, heads, backend="torch")
        assert (dy is None) if dx is None else not dy.any()
        results.append([y, sweeps.adjoint(b)])
        results[-1] += [sweeps.backward(g), sweeps.tangent(t), *sweeps.reverse(S, b, True)]
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < 1e-14


@pytest.mark.parametrize("size", [1e-1, 1e-4, 1e-7, 1e-12])
def test_softmax_difference_does_not_cancel(size, draw):
    S, dS = 3 * draw(4, 9), size * draw(4, 9)
    gold = softmax_difference(S, dS, torch.softmax(S, -1))
    got = softmax_difference(S.float(), dS.float(), torch.softmax(S.float(), -1))
    assert relative(got.double(), gold) < 5e-7
    # The gold itself against the first order in dS, to second order.
    P = torch.softmax(S, -1)
    first = P * (dS - (P * dS).sum(-1, keepdim=True))
    assert relative(gold, first) < 4 * size


@pytest.mark.parametrize("size", [10.0, 100.0, 1e4])
def test_softmax_difference_of_far_scores(size, draw):
    S, dS = draw(6, 9).float(), size * draw(6, 9).float()
    S[:, 3], dS[:, 3] = -torch.inf, 0  # a hidden place
    got = softmax_difference(S, dS, torch.softmax(S, -1))
    want = torch.softmax((S + dS).double(), -1) - torch.softmax(S.double(), -1)
    assert (got - want).abs().max() < 1e-6 and not got[:, 3].any()


def test_small_differences_survive_float32(draw):
    heads = CASES["grouped"]
    x, dx = draw(3, 7, heads.packed), 1e-6 * draw(3, 7, heads.packed)
    x, dx = x.float(), dx.float()
    _, gold, _ = attention.forward(x.double(), dx.double(), heads, backend="torch")
    _, dy, _ = attention.forward(x, dx, heads, backend="torch")
    assert relative(dy.double(), gold) < 1e-6
    plain = plain_attention(x + dx, heads) - plain_attention(x, heads)
    assert relative(plain.double(), gold) > 1e-2


def test_refuses_shapes_that_do_not_fit():
    heads = CASES["grouped"]
    with pytest.raises(InputError, match=r"\[N, T, 40\]"):
        attention.forward(torch.zeros(1, 2, 41), torch.zeros(1, 2, 41), heads)
    with pytest.raises(InputError, match="dx of attention"):
        attention.forward(torch.zeros(1, 2, 40), torch.zeros(1, 3, 40), heads)
