"""The pool of output buffers: reused when dead, never while any view lives, bounded."""

import gc

import pytest
import torch

from fda_fast.ops import memory
from fda_fast.testing import poisoned_empty

BIG = (1024, 256)


@pytest.fixture(autouse=True)
def fresh_pool():
    gc.collect()
    memory.trim()
    yield
    memory.trim()


def like(dtype=torch.float32):
    return torch.empty(0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (3, 5), (1023, 257)])
def test_shape_dtype_layout(shape, dtype):
    out = memory.empty(shape, like(dtype))
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
    out.fill_(3)
    assert bool((out == 3).all())


def test_buffer_is_reused_after_death():
    first = memory.empty(BIG, like())
    address = first.data_ptr()
    assert address % 64 == 0
    del first
    assert memory.empty(BIG, like()).data_ptr() == address


def test_buffer_is_not_reused_while_a_view_lives():
    first = memory.empty(BIG, like())
    view = first.view(-1)[5:9]
    address = first.data_ptr()
    del first
    second = memory.empty(BIG, like())
    assert second.data_ptr() != address
    view.fill_(1)
    second.fill_(2)
    assert view.tolist() == [1, 1, 1, 1]
    del view
    assert memory.empty(BIG, like()).data_ptr() == address


def test_buffer_survives_in_autograd_and_numpy():
    held = memory.empty(BIG, like()).fill_(2)
    weight = torch.ones(BIG, requires_grad=True)
    loss = (weight * held).sum()
    del held
    memory.empty(BIG, like()).fill_(9)
    loss.backward()
    assert bool((weight.grad == 2).all())
    array = memory.empty(BIG, like()).fill_(4).numpy()
    memory.empty(BIG, like()).fill_(9)
    assert (array == 4).all()


def test_held_memory_is_bounded():
    for rows in range(1000, 3000, 50):
        memory.empty((rows, 1024), like())
    used, free = memory.pooled_bytes()
    assert used == 0
    assert free <= memory._SLACK * 3000 * 1024 * 4
    memory.trim()
    assert memory.pooled_bytes() == (0, 0)


def test_poison_marks_forgotten_elements():
    with poisoned_empty():
        for shape in [(3, 5), BIG]:
            assert bool(memory.empty(shape, like()).isnan().all())
    assert not memory._poisoned
