"""The CUDA C++ kernels without a card: compiled for the host, every thread run, every access seen.

What this checks: indices, bounds, alignment, masks and tails, barriers, races within and between
blocks, arithmetic up to rounding; and the Python and the bindings around the kernels: arguments in
order, shapes, dtypes, scratch, the current stream, memory that lives as long as it is used.
What it cannot: occupancy, timing, contracted multiply-adds. tests/gpu checks those, on a card.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import emulated_build
import emulated_device


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    reason = emulated_build.missing()
    if reason:
        pytest.skip(reason)
    return emulated_build.Emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def module(emulator, monkeypatch):
    """The launchers, serving the CUDA backend on CPU tensors."""
    emulated_device.install(emulator.module, monkeypatch)
    return emulator.module


@pytest.fixture
def backend(module):
    return "cuda"


@pytest.fixture
def device(backend):
    return "cpu"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
