"""Alignment: dots, combinations over segments, loss and coefficients."""

import pytest
import torch
import torch.nn.functional as F
from sweeps import check, draw

from fda_fast.errors import InputError
from fda_fast.ops import alignment
from fda_fast.ops.reference import alignment as twin
from fda_fast.testing import assert_no_worse_than_torch

# rows and the widths of the segments
CASES = [(1, [1]), (5, [3, 4]), (33, [64, 1, 19]), (70, [1025]), (0, [3, 2]), (4, [0, 6])]


def operands(generator, rows, widths, K=3):
    o, S = sum(widths), len(widths)
    g, u, v = (draw(generator, K, rows, o) for _ in range(3))
    alpha, beta = draw(generator, K, S), draw(generator, K, S)
    return g, u, v, alpha, beta, draw(generator, K, o)


def test_segments(backend, device, generator):
    for rows, widths in CASES:
        g, u, v, alpha, beta, row = operands(generator, rows, widths)
        check(alignment.dots, twin.dots, (g, u, v, widths), backend, device)
        check(alignment.mix, twin.mix, (alpha, u, beta, v, widths, row), backend, device)
        check(alignment.mix, twin.mix, (alpha, u, beta, v, widths, None), backend, device)


def test_segments_by_hand():
    g = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]], dtype=torch.float64)
    u = torch.ones_like(g)
    expected = torch.tensor([[[1 + 2 + 4 + 5.0, 3 + 6]], [[1 + 4 + 16 + 25.0, 9 + 36]]])
    assert torch.equal(twin.dots(g, u, g, [2, 1]), expected.double())
    alpha = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    mixed = twin.mix(alpha, u, -alpha, g, [2, 1], torch.ones(1, 3, dtype=torch.float64))
    assert mixed[0, 0].tolist() == [1.0, -1.0, -5.0]


def test_coefficients_are_autograd(generator):
    """alpha T + beta G is the gradient of sum_p (1 - cos(G_p, T_p)) in G."""
    sizes = [3, 7, 2]
    G = [draw(generator, n).double().requires_grad_() for n in sizes]
    T = [draw(generator, n).double() for n in sizes]
    loss = sum(1 - F.cosine_similarity(g, t, dim=0) for g, t in zip(G, T, strict=True))
    M = torch.autograd.grad(loss, G)
    dots = torch.stack([torch.stack([g @ t, g @ g]) for g, t in zip(G, T, strict=True)], dim=1)
    squares = torch.stack([t @ t for t in T])[None]
    active = torch.ones(3, dtype=torch.bool)
    out = twin.coefficients(dots.detach()[:, None], squares, active, 1e-8)
    torch.testing.assert_close(out[0][0], loss.detach())
    for p, m in enumerate(M):
        alpha, beta = out[2][:, 0, p]
        torch.testing.assert_close(alpha * T[p] + beta * G[p].detach(), m)


def test_coefficients(backend, device, generator):
    for tasks, parameters in [(1, 1), (3, 12)]:
        square = draw(generator, tasks, parameters).square()
        squares = draw(generator, tasks, parameters).square() * 1e-4
        cosines = draw(generator, tasks, parameters).tanh()
        dots = torch.stack([cosines * (square * squares).sqrt(), square])
        active = torch.arange(parameters) % 5 != 3
        check(
            alignment.coefficients, twin.coefficients, (dots, squares, active, 1e-8),
            backend, device,
        )  # fmt: skip


def test_constant_terms_and_floors(backend, device):
    """Zero task vector, zero gradient, inactive: the term is 1 and takes no part in M."""
    dots = torch.tensor([[[0.0, 0.0, 2.0, 1e-9]], [[4.0, 0.0, 4.0, 1e-18]]], device=device)
    squares = torch.tensor([[0.0, 1.0, 1.0, 1.0]], device=device)
    active = torch.tensor([True, True, False, True], device=device)
    loss, cosines, found = alignment.coefficients(dots, squares, active, 1e-8, backend=backend)
    # The last gradient's norm, 1e-9, is below the floor: its cosine is counted at a tenth.
    torch.testing.assert_close(cosines.cpu(), torch.tensor([[0.0, 0.0, 0.0, 0.1]]))
    torch.testing.assert_close(loss.cpu(), torch.tensor([3.9]))
    assert found[:, 0, 0].tolist() == [0.0, 0.0]
    assert found[1, 0, 1].item() == 0.0
    assert found[:, 0, 2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found[0, 0, 3].item(), -1e8, rtol=1e-5, atol=0)


def layer_terms(generator, dtype):
    """Sums of seven parameters in every form that layers hand them over in, for two tasks."""
    g, u, G_c, t_c = (draw(generator, 2, rows, 19).to(dtype) for rows in (5, 5, 1, 1))
    packed = draw(generator, 2, 16, 9).to(dtype)  # of which each task's parts lie apart
    XX, GG = (draw(generator, 2, 70, 70).to(dtype) for _ in range(2))
    one, two = packed.split([12, 4], dim=1)
    gamma, tau = (draw(generator, 2, 1, 513).to(dtype) for _ in range(2))
    return [
        alignment.Term(gamma, tau, gamma, [513], [6]),
        alignment.Term(g, u, None, [12, 4, 3], [0, 1, 2]),
        alignment.Term(one, None, one, [9], [0]),
        alignment.Term(two, None, two, [9], [1]),
        alignment.Term(XX, None, GG, [70], [2]),
        alignment.Term(G_c, t_c, G_c, [12, 4, 3], [3, None, 4]),
        alignment.Term(gamma, gamma, gamma, [513], [5]),
    ]


def test_evaluate_is_dots_then_coefficients(backend, device, generator):
    squares = draw(generator, 2, 7).square() + 1e-3
    active = torch.arange(7) != 3

    def run(backend, dtype, device):
        generator.manual_seed(1)
        terms = [
            term._replace(
                g=term.g.to(device),
                T=None if term.T is None else term.T.to(device),
                G=None if term.G is None else term.G.to(device),
            )
            for term in layer_terms(generator, dtype)
        ]
        return alignment.evaluate(
            terms, squares.to(device, dtype), active.to(device), backend=backend
        )

    gold = run("torch", torch.float64, "cpu")
    baseline = run("torch", torch.float32, "cpu")
    for o, g, b in zip(run(backend, torch.float32, device), gold, baseline, strict=True):
        assert_no_worse_than_torch(o, g, b)
    # The definition, for the term that is in one piece.
    gamma, tau = layer_terms(generator.manual_seed(1), torch.float64)[0][:2]
    cosine = (gamma * tau).sum(2)[:, 0] / gamma.norm(dim=2)[:, 0] / squares[:, 6].double().sqrt()
    torch.testing.assert_close(gold[1][:, 6], cosine)


def test_every_sum_is_there_once(generator):
    terms = layer_terms(generator, torch.float32)
    squares, active = torch.ones(2, 7), torch.ones(7, dtype=torch.bool)
    with pytest.raises(InputError, match="terms with T: expected one of each of 7 parameters"):
        alignment.evaluate(terms[1:], squares, active)
    with pytest.raises(InputError, match="terms with G: expected one of each of 7 parameters"):
        alignment.evaluate([*terms, terms[2]], squares, active)


def test_widths_must_cover_the_columns(backend):
    if backend != "cpu":
        pytest.skip("checked where raw pointers are read")
    g = torch.zeros(1, 2, 5)
    with pytest.raises(InputError, match=r"widths: expected 5 columns in all, got \[2, 2\]"):
        alignment.dots(g, g, g, [2, 2], backend=backend)


def test_dots_do_not_depend_on_threads(backend, generator):
    if backend != "cpu":
        pytest.skip("threads are those of the CPU")
    g, u, v, *_ = operands(generator, 900, [96, 31])
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(alignment.dots(g, u, v, [96, 31], backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
