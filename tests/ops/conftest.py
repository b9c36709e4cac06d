"""Every backend runs the same tests; one that cannot run here is one visible skip.

The C++ backend runs once for each instruction set that was compiled and that this machine has.
"""

import sys
from pathlib import Path

import pytest
import torch

from fda_fast import _native
from fda_fast.ops import dispatch

# For the helpers in ``sweeps``.
sys.path.insert(0, str(Path(__file__).parent))

CPU_ISAS = ["baseline", "avx2", "avx512"]


@pytest.fixture(params=["torch", *(f"cpu:{isa}" for isa in CPU_ISAS), "cuda"])
def backend(request):
    name, _, isa = request.param.partition(":")
    reason = dispatch.available()[name]
    if reason:
        pytest.skip(reason)
    if not isa:
        yield name
        return
    library = _native.load()
    if isa not in library.isas():
        pytest.skip(f"this machine does not run {isa}")
    before = library.isa()
    library.use_isa(isa)
    yield name
    library.use_isa(before)


@pytest.fixture
def device(backend):
    return "cuda" if backend == "cuda" else "cpu"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
