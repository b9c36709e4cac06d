"""Subspace similarity against projection matrices written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.report import subspace_overlap


def random(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_against_projection_matrices() -> None:
    first, second = random(30, 12, 0), random(40, 12, 1)
    found = subspace_overlap(first, second, range(1, 13))
    for rank, similarity, chance in zip(found.ranks, found.similarity, found.chance, strict=True):
        projections = []
        for vectors in (first, second):
            v = np.linalg.svd(vectors.double().numpy())[2][:rank].T
            projections.append(v @ v.T)
        assert similarity == pytest.approx(np.trace(projections[0] @ projections[1]) / rank)
        assert chance == pytest.approx(rank / 12)
    assert found.similarity[-1] == pytest.approx(1)


def test_itself_and_the_default_rank() -> None:
    vectors = random(50, 20, 2)
    found = subspace_overlap(vectors.reshape(10, 5, 20), vectors)
    assert found.ranks == (4,) and found.similarity[0] == pytest.approx(1)


def test_orthogonal_subspaces_do_not_overlap() -> None:
    first, second = torch.eye(8)[:4], torch.eye(8)[4:]
    assert subspace_overlap(first, second, [4]).similarity[0] == pytest.approx(0, abs=1e-12)


def test_random_subspaces_overlap_as_chance_says() -> None:
    found = [
        subspace_overlap(random(64, 40, 2 * i), random(64, 40, 2 * i + 1)).similarity[0]
        for i in range(20)
    ]
    # The mean of tr(PQ)/k is k/d; its spread over draws shrinks with k (d - k).
    assert np.mean(found) == pytest.approx(0.2, abs=0.02)


def test_more_directions_than_vectors_span() -> None:
    with pytest.raises(InputError, match="at most 3"):
        subspace_overlap(random(3, 12, 0), random(40, 12, 1), [4])
    with pytest.raises(InputError, match="width"):
        subspace_overlap(random(9, 12, 0), random(9, 11, 1))
