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
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ALONE = "run in a process of its own: TRITON_INTERPRET=1 pytest tests/kernels (make kernels)"


def pytest_configure(config):
    paths = [Path(str(arg).split("::")[0]).resolve() for arg in config.args]
    alone = all(path == HERE or HERE in path.parents for path in paths)
    if alone and "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # One thread: the interpreter runs numpy on small arrays.
    torch.set_num_threads(1)


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
