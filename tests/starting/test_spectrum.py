"""Leading triplets and polar factors against full decompositions."""

import pytest
import torch

from fda_fast.starting.spectrum import leading_triplets, low_rank, polar_factor


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_singular_values(rows, columns, values, seed=0):
    rank = len(values)
    u = torch.linalg.qr(normal(rows, rank, seed=seed)).Q
    v = torch.linalg.qr(normal(columns, rank, seed=seed + 1)).Q
    return (u * values) @ v.T


def defined_polar(matrix):
    p, _, qt = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qt


@pytest.mark.parametrize("shape", [(20, 30), (64, 100), (100, 64), (80, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triplets_rebuild_the_best_approximation(shape, dtype):
    matrix = normal(*shape, dtype=dtype)
    u, s, v = leading_triplets(matrix, 7)
    uu, ss, vvt = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert (u.shape, s.shape, v.shape) == ((shape[0], 7), (7,), (shape[1], 7))
    torch.testing.assert_close(s, ss[:7], rtol=1e-12, atol=0)
    best = (uu[:, :7] * ss[:7]) @ vvt[:7]
    assert float(((u * s) @ v.T - best).norm() / best.norm()) < 1e-9
    for vectors in (u, v):
        identity = torch.eye(7, dtype=torch.float64)
        torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_is_found_exactly_when_it_is_there(dtype):
    product = (normal(96, 5) @ normal(5, 128, seed=1)).to(dtype)
    factors = low_rank(product)
    assert factors is not None
    basis, core = factors
    gap = torch.linalg.matrix_norm(product.double() - basis @ core)
    assert float(gap) <= 4 * torch.finfo(dtype).eps * float(product.norm())
    assert low_rank(normal(96, 128, dtype=dtype)) is None
    # A tail far below the product but above its rounding is not cut off.
    tail = 1e-5 if dtype == torch.float32 else 1e-12
    assert low_rank(product + tail * normal(96, 128, seed=2).to(dtype)) is None


def test_zero_singular_values_give_no_triplets():
    for rows, columns in ((30, 40), (96, 128)):
        matrix = normal(rows, 3) @ normal(3, columns, seed=1)
        u, s, v = leading_triplets(matrix, 10)
        assert (u.shape[1], len(s), v.shape[1]) == (3, 3, 3)
        assert leading_triplets(torch.zeros(rows, columns), 10)[1].numel() == 0


def test_rank_between_the_probe_and_the_count():
    matrix = normal(96, 30) @ normal(30, 128, seed=1)
    assert low_rank(matrix) is None
    assert leading_triplets(matrix, 40)[1].numel() == 30


def test_steep_spectrum_takes_the_exact_path():
    values = torch.logspace(0, -9, 64, dtype=torch.float64)
    matrix = with_singular_values(64, 80, values)
    _, s, _ = leading_triplets(matrix, 60)
    torch.testing.assert_close(s, values[:60], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(40, 12), (30, 30), (12, 40)])
@pytest.mark.parametrize("least", [1.0, 1e-2, 3e-4, 3e-5, 1e-5])
def test_polar_factor_equals_that_of_the_svd(shape, least, monkeypatch):
    """By Gram matrix and by Newton iteration; neither may fall back on the SVD in this range."""
    values = torch.linspace(1, least, min(shape), dtype=torch.float64)
    matrix = with_singular_values(*shape, values, seed=4)
    expected = defined_polar(matrix)
    monkeypatch.delattr(torch.linalg, "svd")
    assert float((polar_factor(matrix) - expected).abs().max()) < 3e-8


def test_polar_factor_below_the_iterations_reach():
    values = torch.tensor([1, 0.5, 1e-6], dtype=torch.float64)
    matrix = with_singular_values(6, 5, values)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = u[:, :3] @ vt[:3]
    torch.testing.assert_close(polar_factor(matrix, rtol=1e-9), kept, rtol=0, atol=1e-8)
    cut = u[:, :2] @ vt[:2]
    torch.testing.assert_close(polar_factor(matrix, rtol=1e-4), cut, rtol=0, atol=1e-8)


def test_polar_factor_leaves_null_directions_out():
    block = torch.linalg.qr(normal(20, 4)).Q
    twice = torch.cat([block, block], dim=1)
    expected = torch.cat([block, block], dim=1) / 2**0.5
    torch.testing.assert_close(polar_factor(twice), expected, rtol=0, atol=1e-12)
    assert polar_factor(torch.zeros(5, 0, dtype=torch.float64)).shape == (5, 0)
