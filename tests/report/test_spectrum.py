"""Spectra against their definitions on small cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.report import spectrum


def with_values(values: list[float], rows: int = 8, width: int = 6) -> torch.Tensor:
    """A matrix [rows, width] with these singular values."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.double)).Q
    v = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.double)).Q
    count = len(values)
    return u[:, :count] * torch.tensor(values, dtype=torch.double) @ v[:count]


def test_numbers_against_their_definitions() -> None:
    values = [5.0, 3.0, 2.0, 1.0, 0.5, 0.25]
    found = spectrum(with_values(values))
    torch.testing.assert_close(found.values, torch.tensor(values).double() / 5)
    matrix = with_values(values).numpy()
    frobenius, largest = np.linalg.norm(matrix), np.linalg.norm(matrix, 2)
    assert found.stable_rank == pytest.approx((frobenius / largest) ** 2, rel=1e-9)
    share = np.array(values) / sum(values)
    assert found.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    # Gini: mean absolute difference of all pairs over twice the mean.
    pairs = np.abs(np.subtract.outer(values, values)).mean()
    assert found.gini == pytest.approx(pairs / (2 * np.mean(values)), rel=1e-9)


def test_flat_and_one_direction() -> None:
    flat = spectrum(with_values([2.0] * 6))
    assert flat.gini == pytest.approx(0, abs=1e-12)
    assert flat.stable_rank == pytest.approx(6) and flat.effective_rank == pytest.approx(6)
    one = spectrum(torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 7)))
    assert one.gini == pytest.approx(1 - 1 / 6, abs=1e-6)
    assert one.stable_rank == pytest.approx(1) and one.effective_rank == pytest.approx(1, abs=1e-4)


def test_tokens_are_unfolded_and_the_scale_does_not_matter() -> None:
    anchors = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    found, flat = spectrum(anchors), spectrum(7 * anchors.reshape(12, 6))
    torch.testing.assert_close(found.values, flat.values, rtol=1e-6, atol=0)
    assert math.isclose(found.gini, flat.gini, rel_tol=1e-6)


@pytest.mark.parametrize("bad", [torch.zeros(3, 4), torch.full((3, 4), math.nan), torch.zeros(5)])
def test_refusals(bad: torch.Tensor) -> None:
    with pytest.raises(InputError, match="anchors"):
        spectrum(bad)
