"""Every backend runs the same tests; one that cannot run here is one visible skip."""

import pytest
import torch

from fda_fast.ops import dispatch


@pytest.fixture(params=["torch", "cpu", "cuda"])
def backend(request):
    reason = dispatch.available()[request.param]
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "cuda" else "cpu"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
