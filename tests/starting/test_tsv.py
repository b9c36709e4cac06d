"""TSV-M against the definition written out with full SVDs."""

import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.starting import tsv

TOLERANCE = 1e-6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def defined_tsv(deltas, k):
    """Gargiulo et al.: cut, concatenate, orthogonalise by the polar factor of a thin SVD."""
    tasks, rows, columns = deltas.shape
    rank = min(rows, columns)
    left = deltas.new_zeros(rows, rank)
    values = deltas.new_zeros(rank)
    right = deltas.new_zeros(rank, columns)
    for i in range(tasks):
        u, s, vt = torch.linalg.svd(deltas[i], full_matrices=False)
        left[:, i * k : (i + 1) * k] = u[:, :k]
        values[i * k : (i + 1) * k] = s[:k]
        right[i * k : (i + 1) * k] = vt[:k]
    p, _, qt = torch.linalg.svd(left, full_matrices=False)
    p2, _, qt2 = torch.linalg.svd(right, full_matrices=False)
    return (p @ qt) @ torch.diag(values) @ (p2 @ qt2)


def relative(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


def fine_tuned(tasks, rows, columns, *, shared=0.5, decay=0.6, seed=0):
    """Long-tailed spectra, part of the leading directions shared: as task vectors are."""
    g = generator(seed)
    rank = min(rows, columns)
    left, right = torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g)
    powers = (1 + torch.arange(rank)) ** -decay
    stack = []
    for _ in range(tasks):
        u = (shared * left + torch.randn(rows, rank, generator=g)) * powers
        stack.append(u @ (shared * right + torch.randn(rank, columns, generator=g)))
    return 1e-3 * torch.stack(stack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tasks", "rows", "columns"),
    [(8, 64, 128), (8, 128, 64), (4, 96, 96), (3, 61, 103), (2, 40, 20), (8, 16, 200)],
)
def test_equals_the_definition(tasks, rows, columns, dtype):
    deltas = fine_tuned(tasks, rows, columns).to(dtype)
    exact = defined_tsv(deltas.double(), min(rows, columns) // tasks)
    result = tsv(deltas)
    assert result.dtype == dtype
    assert relative(result, exact) < TOLERANCE


@pytest.mark.parametrize("shared", [0.0, 2.0, 8.0])
def test_equals_the_definition_however_much_the_tasks_share(shared):
    """Strong sharing makes the concatenated vectors nearly dependent: the polar factor's trap."""
    deltas = fine_tuned(8, 64, 128, shared=shared)
    exact = defined_tsv(deltas.double(), 8)
    assert relative(tsv(deltas), exact) < TOLERANCE


def test_clustered_singular_values_do_not_matter():
    """Vectors within a cluster are arbitrary up to a rotation, which the result does not feel."""
    g = generator(3)
    stack = []
    for _ in range(4):
        u = torch.linalg.qr(torch.randn(80, 80, generator=g, dtype=torch.float64)).Q
        v = torch.linalg.qr(torch.randn(120, 80, generator=g, dtype=torch.float64)).Q
        s = torch.cat([torch.full((20,), 1.0), torch.full((60,), 0.3)]).double()
        stack.append((u * s) @ v.T)
    deltas = torch.stack(stack).double()
    assert relative(tsv(deltas), defined_tsv(deltas, 20)) < TOLERANCE


def test_steep_spectra_are_resolved():
    """Kept values down to 1e-6 of the largest: below what a Gram matrix can tell."""
    g = generator(4)
    stack = []
    for _ in range(4):
        u = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64)).Q
        v = torch.linalg.qr(torch.randn(90, 64, generator=g, dtype=torch.float64)).Q
        stack.append((u * torch.logspace(0, -24, 64, dtype=torch.float64)) @ v.T)
    deltas = torch.stack(stack)
    assert relative(tsv(deltas), defined_tsv(deltas, 16)) < TOLERANCE


def test_lora_task_vectors_with_enough_rank_equal_the_definition():
    g = generator(5)
    deltas = torch.stack(
        [torch.randn(80, 10, generator=g) @ torch.randn(10, 96, generator=g) for _ in range(8)]
    )
    exact = defined_tsv(deltas.double(), 10)
    assert relative(tsv(deltas), exact) < TOLERANCE


def test_lora_task_vectors_of_low_rank_use_their_own_vectors_only():
    """Rank 3 under k = 20: defined by the three triplets there are; a full SVD invents 17 more."""
    g = generator(6)
    deltas = torch.stack(
        [torch.randn(80, 3, generator=g) @ torch.randn(3, 96, generator=g) for _ in range(4)]
    )
    result = tsv(deltas)
    assert relative(result, defined_tsv(deltas.double(), 3)) < TOLERANCE
    assert int(torch.linalg.matrix_rank(result)) == 12
    noisy = deltas + 1e-9 * torch.randn(4, 80, 96, generator=g)
    assert relative(tsv(noisy), result.double()) < TOLERANCE


def test_tasks_on_orthogonal_subspaces_are_simply_added():
    deltas = torch.zeros(2, 8, 10)
    deltas[0, :3, :4] = torch.randn(3, 4, generator=generator(7))
    deltas[1, 3:6, 5:9] = torch.randn(3, 4, generator=generator(8))
    assert relative(tsv(deltas, count=4), deltas.double().sum(dim=0)) < TOLERANCE


def test_one_task_gives_itself_back():
    delta = fine_tuned(1, 30, 50)
    assert relative(tsv(delta), delta[0].double()) < TOLERANCE


def test_equal_experts_give_their_own_leading_part():
    """Dependent columns: the definition adds arbitrary null directions, this does not."""
    delta = fine_tuned(1, 64, 90)[0]
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    leading = (u[:, :32] * s[:32]) @ vt[:32]
    assert relative(tsv([delta, delta]), leading) < TOLERANCE


def test_properties():
    deltas = fine_tuned(3, 30, 45)
    merged = tsv(deltas)
    assert relative(tsv(deltas * 4), merged.double() * 4) < TOLERANCE
    assert relative(tsv(deltas.transpose(1, 2)), merged.double().T) < TOLERANCE
    assert relative(tsv(deltas[[2, 0, 1]]), merged.double()) < TOLERANCE
    assert torch.equal(tsv(list(deltas)), merged)
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=generator(9))).Q.double()
    assert relative(tsv(rotation @ deltas.double()), rotation @ merged.double()) < TOLERANCE


def test_zero_task_vectors():
    deltas = fine_tuned(2, 20, 30)
    with_zero = torch.cat([deltas, torch.zeros(1, 20, 30)])
    assert torch.equal(tsv(with_zero, count=6), tsv(deltas, count=6))
    assert torch.equal(tsv(torch.zeros(2, 20, 30)), torch.zeros(20, 30))
    assert torch.equal(tsv(torch.zeros(2, 60, 90)), torch.zeros(60, 90))
    assert tsv(torch.zeros(2, 0, 5)).shape == (0, 5)


def test_more_tasks_than_rows_keeps_one_triplet_of_each():
    deltas = fine_tuned(5, 4, 12)
    assert torch.isfinite(tsv(deltas)).all()
    assert int(torch.linalg.matrix_rank(tsv(deltas))) == 4


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_result_is_reproducible(kind):
    """The random projection that looks for low rank draws the same numbers every time."""
    deltas = fine_tuned(4, 96, 128)
    if kind == "lora":
        deltas = deltas[:, :, :5] @ deltas[:, :5]
    torch.manual_seed(1)
    first = tsv(deltas)
    torch.manual_seed(2)
    assert torch.equal(first, tsv(deltas))


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([], "at least one"),
        ([torch.ones(3)], "matrices"),
        ([torch.ones(3, 4), torch.ones(4, 3)], "task vector 1"),
        ([torch.ones(3, 4, dtype=torch.int64)], "floating point"),
        ([torch.ones(3, 4), torch.full((3, 4), float("nan"))], "task vector 1: expected finite"),
        ([torch.tensor([[1.0, float("inf"), float("-inf")]])], "task vector 0: expected finite"),
    ],
)
def test_bad_task_vectors_are_refused(deltas, message):
    with pytest.raises(InputError, match=message):
        tsv(deltas)


def test_bad_count_is_refused():
    with pytest.raises(InputError, match="count"):
        tsv(torch.ones(2, 3, 4), count=0)
