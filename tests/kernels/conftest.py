"""Triton kernels on the CPU, in the interpreter.

What this checks: the arithmetic, masks and tails of every kernel, and that every element is
written and nothing else is. What it cannot: warps, pipelining, shared memory, tensor cores, the
card's approximate exp and division, timing. tests/gpu checks those.

The interpreter is chosen when the kernels are imported, and must already be chosen when triton
itself is first imported; so these tests want a process of their own (``make kernels``). In a
process that runs other tests too, they are skipped.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# The test modules import the kernels, and those triton.
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
ALONE = "run in a process of its own: TRITON_INTERPRET=1 pytest tests/kernels (make kernels)"


def pytest_configure(config):
    paths = [Path(str(arg).split("::")[0]).resolve() for arg in config.args]
    alone = all(path == HERE or HERE in path.parents for path in paths)
    if alone and "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _repair_loop_bounds()
    # One thread: the interpreter runs numpy on small arrays.
    torch.set_num_threads(1)


def _repair_loop_bounds():
    """Triton 3.6's interpreter takes int() of a one-element array, which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason=ALONE))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned():
    """Every output starts as NaN, so that an element nobody wrote fails its comparison."""
    from fda_fast.testing import poisoned_empty

    with poisoned_empty():
        yield


@pytest.fixture
def outputs(monkeypatch):
    """Every output the kernels allocate lies between sentinels; returns the guards to check."""
    from fda_fast.ops import memory
    from fda_fast.testing import GuardedView

    guards = []

    def empty(shape, like, dtype=None):
        dtype = like.dtype if dtype is None else dtype
        guards.append(GuardedView(torch.full(tuple(shape), torch.nan, dtype=dtype)))
        return guards[-1].tensor

    monkeypatch.setattr(memory, "empty", empty)
    return guards


@pytest.fixture
def hold(outputs, monkeypatch):
    """``hold(kernel, twin, *arguments)``: hold a kernel to its torch twin's own error.

    Tensor arguments are drawn in the storage dtype. The twin gives the gold in float64, and the
    allowed error in float32, rounded once to the storage dtype: stricter than its own arithmetic
    in that dtype.
    """
    from fda_fast.ops import memory
    from fda_fast.testing import GuardedView, assert_no_worse_than_torch

    def convert(value, dtype):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    def guard(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return GuardedView(value).tensor if floating else value

    def results(value):
        return value if isinstance(value, tuple) else (value,)

    guarded_empty = memory.empty

    def run_twin(twin, arguments, dtype):
        # The twins allocate too, and must not be poisoned twice over nor guarded.
        memory.empty = lambda shape, like, dtype=None: torch.empty(shape, dtype=dtype or like.dtype)
        try:
            return results(twin(*(convert(value, dtype) for value in arguments)))
        finally:
            memory.empty = guarded_empty

    def hold(kernel, twin, *arguments):
        out = results(kernel(*map(guard, arguments)))
        gold = run_twin(twin, arguments, torch.float64)
        baseline = run_twin(twin, arguments, torch.float32)
        assert len(out) == len(gold)
        for i, (o, g, b) in enumerate(zip(out, gold, baseline, strict=True)):
            assert (o is None) == (g is None), f"output {i}"
            if o is not None:
                name = f"{kernel.__module__}.{kernel.__name__} output {i}"
                assert_no_worse_than_torch(o, g, b.to(o.dtype), name=name)
        for one in outputs:
            one.check()
        outputs.clear()

    return hold


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def draw(generator, dtype):
    """``draw(*shape, scale=1.0)``: normal numbers in the storage dtype."""

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return draw
