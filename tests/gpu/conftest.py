"""Tests that need a card: ``pytest -m gpu``.

Dry run without one: ``TRITON_INTERPRET=1 pytest -m gpu tests/gpu`` runs what makes sense on the
CPU (Triton in the interpreter, tiny shapes), so that the tests themselves are known to work.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from fda_fast.ops import dispatch

HERE = Path(__file__).parent
CARD = torch.cuda.is_available()
DRY = not CARD and os.environ.get("TRITON_INTERPRET") == "1"

sys.path.insert(0, str(HERE))


def pytest_configure(config):
    if DRY:
        from triton.runtime import interpreter

        original = interpreter._patch_lang_tensor

        # Triton 3.6's interpreter takes int() of a one-element array, which numpy 2.4 refuses.
        def patched(tensor, scope):
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE not in Path(item.path).parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not CARD and (not DRY or item.get_closest_marker("card")):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture
def device():
    return "cuda" if CARD else "cpu"


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = dispatch.available()[request.param]
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def real():
    """``real(8192, 16)``: the real size on a card, the tiny one in the dry run."""
    return lambda on_card, dry: on_card if CARD else dry


@pytest.fixture(autouse=True)
def exact_products():
    """References multiply in float32 proper."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
