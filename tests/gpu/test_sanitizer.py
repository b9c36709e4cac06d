"""The CUDA C++ kernels under compute-sanitizer: accesses, races, uninitialised reads."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fda_fast.ops import dispatch

TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)


@pytest.mark.card
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("check", ["memcheck", "racecheck", "synccheck"])
def test_clean(check):
    reason = dispatch.available()["cuda"]
    if reason:
        pytest.skip(reason)
    command = [TOOL, "--tool", check, "--error-exitcode", "86", sys.executable]
    target = str(Path(__file__).with_name("sanitizer_target.py"))
    done = subprocess.run([*command, target], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
