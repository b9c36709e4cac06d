import pytest
import torch

from fda_fast.kernels import alignment
from fda_fast.ops.reference import alignment as twin

WIDTHS = [(1,), (37,), (16, 16, 16), (1023, 1, 5), (1025,), (777, 700)]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("tasks", "rows"), [(1, 1), (2, 5)])
def test_segments(widths, tasks, rows, hold, draw):
    width, segments = sum(widths), len(widths)
    g, u, v = (draw(tasks, rows, width) for _ in range(3))
    alpha, beta = draw(tasks, segments), draw(tasks, segments)
    row = draw(tasks, width)
    hold(alignment.dots, twin.dots, g, u, v, widths)
    hold(alignment.mix, twin.mix, alpha, u, beta, v, widths, row)
    hold(alignment.mix, twin.mix, alpha, u, beta, v, widths, None)


def test_dots_over_several_chunks(hold, draw):
    rows = 2 * (alignment.CHUNK_ELEMENTS // 700) + 3
    g, u, v = (draw(1, rows, 1400) for _ in range(3))
    hold(alignment.dots, twin.dots, g, u, v, (700, 700))


def test_coefficients_of_some_of_the_terms(hold, draw):
    """A layer hands the columns of its weights on, out of those of all its parameters."""
    u, v = (draw(2, 3, 9) for _ in range(2))
    alpha, beta = draw(2, 2, 5)[:, :, :3]
    widths = (4, 3, 2)

    both = torch.stack([alpha, beta])
    out = alignment.mix(alpha, u, beta, v, widths, None)
    assert torch.equal(out, alignment.mix(both[0], u, both[1], v, widths, None))


def test_no_rows(hold, draw):
    empty = draw(2, 0, 6)
    hold(alignment.dots, twin.dots, empty, empty, empty, (4, 2))
    c = draw(2, 2)
    hold(alignment.mix, twin.mix, c, empty, c, empty, (4, 2), None)


@pytest.mark.parametrize("terms", [1, 3, 16, 17])
def test_coefficients(terms, hold, generator):
    def draw():
        return torch.randn(4, terms, generator=generator)

    square = draw().square()
    square[0] = 0  # a gradient of zero
    square[1] *= 1e-22  # below the floor
    squares = draw().square()
    squares[:, 0] = 0  # an untouched tensor
    dots = torch.stack([draw() * 0.5 * (square * squares).sqrt(), square])
    active = torch.rand(terms, generator=generator) > 0.3
    hold(alignment.coefficients, twin.coefficients, dots, squares, active, 1e-8)


def test_not_a_number_reaches_the_loss():
    dots = torch.tensor([[[0.5, torch.nan]], [[1.0, 1.0]]])
    for bad in (dots, dots.flip(0)):
        loss, _, _ = alignment.coefficients(
            bad, torch.ones(1, 2), torch.ones(2, dtype=torch.bool), 1e-8
        )
        assert bool(loss.isnan())
