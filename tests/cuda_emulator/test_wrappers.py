"""What the Python around the launchers refuses, and what it must not let happen."""

import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.ops import adamw, alignment, coefficients, dispatch


def test_this_is_the_cuda_backend(module):
    for stem in ("alignment", "adamw", "coefficients"):
        found = dispatch.implementation(stem, torch.zeros(1), "cuda")
        assert found.__name__ == f"fda_fast.ops.cuda.{stem}"


def test_coefficients_that_had_to_be_converted_live_until_the_launch(module, generator):
    u, v = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    alpha, beta = (torch.randn(2, 1, generator=generator).bfloat16() for _ in range(2))
    out = alignment.mix(alpha, u, beta, v, [5], backend="cuda")
    torch.testing.assert_close(out, alpha.float()[..., None] * u + beta.float()[..., None] * v)


def test_a_mask_that_had_to_be_copied_lives_until_the_launch(module):
    dots, squares = torch.ones(2, 1, 4), torch.ones(1, 4)
    active = torch.tensor([True, False] * 4)[::2]
    loss, _, _ = alignment.coefficients(dots, squares, active, backend="cuda")
    assert loss.tolist() == [0.0]


def test_bad_input_is_named(module):
    g = torch.zeros(1, 2, 34)
    with pytest.raises(InputError, match="widths: expected 1 to 16 segments of 34 columns in all"):
        alignment.dots(g, g, g, [2] * 17, backend="cuda")
    with pytest.raises(InputError, match=r"widths: .*, got \[30, 5\]"):
        alignment.dots(g, g, g, [30, 5], backend="cuda")
    with pytest.raises(InputError, match=r"T: expected torch.float32 of shape \[1, 2, 34\]"):
        alignment.dots(g, g[:, :1], g, [34], backend="cuda")
    with pytest.raises(InputError, match=r"G: expected .* each task contiguous, got .* strides"):
        alignment.dots(g, g, torch.zeros(1, 34, 2).mT, [34], backend="cuda")
    with pytest.raises(InputError, match=r"alpha: expected torch.float32 of shape \[1, 1\]"):
        alignment.mix(torch.zeros(1, 2), g, torch.zeros(1, 1), g, [34], backend="cuda")
    with pytest.raises(InputError, match="row: expected contiguous"):
        c = torch.zeros(1, 1)
        alignment.mix(c, g, c, g, [34], torch.zeros(1, 33), backend="cuda")
    with pytest.raises(InputError, match=r"active: expected contiguous torch.bool"):
        alignment.coefficients(torch.ones(2, 1, 3), torch.ones(1, 3), torch.ones(3), backend="cuda")
    x, loss = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(InputError, match=r"step: expected contiguous torch.int64"):
        adamw.step_(x, x, x, x, torch.tensor(1.0), loss, loss, x, 0.1, backend="cuda")
    with pytest.raises(InputError, match=r"step: expected contiguous torch.int64"):
        coefficients.update_(x, x, x[0], x[0], x[0], x[0], torch.tensor(1.0), 0.1, backend="cuda")


def evaluate(*terms):
    count = len(terms)
    active = torch.ones(count, dtype=torch.bool)
    return alignment.evaluate(terms, torch.ones(1, count), active, backend="cuda")


def test_bad_terms_are_named(module):
    g, half = torch.zeros(1, 2, 4), torch.zeros(1, 1, 4).half()
    term = alignment.Term(g, g, g, [4], [0])
    with pytest.raises(InputError, match=r"T: expected torch.float32 of shape \[1, 2, 4\]"):
        evaluate(term._replace(T=g.bfloat16()))
    with pytest.raises(InputError, match=r"g: expected torch.float32 of shape \[1, 1, 4\]"):
        evaluate(term, alignment.Term(half, half, half, [4], [1]))
    with pytest.raises(InputError, match=r"g: expected torch.float32 of shape \[1, 2, 4\]"):
        two = torch.zeros(2, 2, 4)
        evaluate(alignment.Term(two, two, two, [4], [0]))


def test_too_many_terms_are_summed_one_by_one(module):
    g = torch.ones(1, 2, 4)
    loss, *_ = evaluate(*(alignment.Term(g, g, g, [4], [p]) for p in range(129)))
    assert len(module.take_log()) == 2 * 129 + 1
    torch.testing.assert_close(loss, torch.tensor([129 * (1 - 8**0.5)]))


def test_a_failing_launch_names_its_kernel(module):
    x = torch.zeros(65536, 1)
    loss = torch.zeros(65536)
    with pytest.raises(RuntimeError, match="adamw_step: cudaErrorInvalidConfiguration"):
        adamw.step_(x, x, x, x, 1, loss, loss, x, 0.1, backend="cuda")
    with pytest.raises(RuntimeError, match="alignment_dots: cudaErrorInvalidValue"):
        module.cuda_alignment_dots(3, 1, 1, [], 0, 0, 0, 0)


def test_nothing_to_do_launches_nothing(module):
    empty = torch.zeros(0, 3)
    loss = torch.zeros(0)
    adamw.step_(empty, empty, empty, empty, 1, loss, loss, empty, 0.1, backend="cuda")
    none = torch.zeros(2, 0)
    coefficients.update_(none, none, *[none[0]] * 4, 1, 0.1, backend="cuda")
    c, rows = torch.zeros(2, 1), torch.zeros(2, 0, 3)
    assert alignment.mix(c, rows, c, rows, [3], backend="cuda").shape == (2, 0, 3)
    assert module.take_log() == []
    assert alignment.dots(rows, rows, rows, [3], backend="cuda").tolist() == [[[0], [0]]] * 2
    assert [kernel for kernel, *_ in module.take_log()] == ["finish_kernel<kCoefficients>"]
