"""The CUDA sources, compiled by nvcc for every shipped architecture; no card needed."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
ARCHS = ("80", "90a", "100")
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What ptxas says of each source: {source name: text}."""
    folder = tmp_path_factory.mktemp("cuda")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")

    def compile_one(source):
        command = [
            NVCC, "-std=c++17", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror",
            *codes, "-c", str(source), "-o", str(folder / f"{source.stem}.o"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source.name}:\n{done.stderr}"
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip([s.name for s in SOURCES], pool.map(compile_one, SOURCES), strict=True))


def test_there_are_sources():
    assert {source.stem for source in SOURCES} == {"adamw", "alignment", "coefficients"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_spills(source, reports):
    text = reports[source.name]
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    )
    kernels = len(re.findall(r"^__global__", source.read_text(), re.M))
    assert len(frames) >= kernels * len(ARCHS)
    assert set(frames) == {("0", "0", "0")}, text


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_full_blocks_fit(source, reports):
    """256 threads a block, eight blocks of 2048 threads: at most 64 registers keeps four."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", reports[source.name])]
    assert registers and max(registers) <= 64


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_relaxed_arithmetic(source):
    """Fast-math intrinsics would change the numbers that the tests compare."""
    assert not re.search(r"__(expf|logf|fdividef|frsqrt)|use_fast_math", source.read_text())
