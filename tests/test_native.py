"""The native extension: how it is built or left out, loaded or missed, and its threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fda_fast import _native

ROOT = Path(__file__).resolve().parents[1]
LOADED = pytest.mark.skipif(bool(_native.reason()), reason=_native.reason())


def setup(*arguments, **environment):
    """Run setup.py with nothing on the PATH unless the test puts it there."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT, env={**kept, "PATH": "", **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def python(code, **environment):
    """Run code in a fresh interpreter outside the repository; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/", env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_compiler_installs_without_the_extension_and_says_so():
    done = setup("--name", FDA_FAST_CUDA="0")
    assert done.returncode == 0
    assert "no C++ compiler found" in done.stderr
    assert "PyTorch twins" in done.stderr


def test_missing_nvcc_is_a_warning_that_names_the_places_searched():
    done = setup("--name", CUDA_HOME="/nowhere/cuda")
    assert done.returncode == 0
    assert "nvcc not found (/nowhere/cuda/bin/nvcc, nvcc on the PATH)" in done.stderr


def test_required_cuda_stops_the_installation():
    done = setup("--name", FDA_FAST_CUDA="1")
    assert done.returncode != 0
    assert "FDA_FAST_CUDA=1, but nvcc not found" in done.stderr


def test_unknown_setting_stops_the_installation():
    done = setup("--name", FDA_FAST_CUDA="yes")
    assert done.returncode != 0
    assert "FDA_FAST_CUDA=yes: expected auto, 0 or 1" in done.stderr


def test_failing_compiler_stops_the_installation(tmp_path):
    compiler = tmp_path / "broken-cxx"
    compiler.write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 3\n")
    compiler.chmod(0o755)
    done = setup(
        "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "tmp"),
        CXX=str(compiler), FDA_FAST_CUDA="0",
    )  # fmt: skip
    assert done.returncode != 0
    assert "fda_fast: failed:" in done.stderr and "internal compiler error" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


WITHOUT = "import sys; sys.modules['fda_fast._C'] = None\n"


def test_without_the_extension_auto_runs_the_twins():
    code = WITHOUT + (
        "import torch\n"
        "from fda_fast.ops import activation, dispatch\n"
        "x = torch.randn(5)\n"
        "y, _ = activation.forward('silu', x, None)\n"
        "assert torch.allclose(y, torch.nn.functional.silu(x))\n"
        "print(dispatch.available()['cpu'])\n"
    )
    assert "the native extension fda_fast._C is not there" in python(code)


def test_without_the_extension_asking_for_it_raises_and_names_the_fix():
    code = WITHOUT + (
        "import torch\n"
        "from fda_fast import _native\n"
        "from fda_fast.ops import activation\n"
        "for call in (lambda: activation.forward('silu', torch.ones(1), None, backend='cpu'),\n"
        "             _native.load):\n"
        "    try:\n"
        "        call()\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    by_op, by_load = python(code).strip().splitlines()
    assert "backend 'cpu' cannot compute activation on torch.float32 on cpu" in by_op
    assert "fda_fast._C is not there" in by_op
    assert "Reinstall fda_fast from source with a C++17 compiler" in by_load


def test_import_of_the_package_loads_no_binary():
    code = "import sys, fda_fast; print('fda_fast._C' in sys.modules, 'triton' in sys.modules)"
    assert python(code).split() == ["False", "False"]


@LOADED
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_torchs_own():
    """One OpenMP runtime in the process, and no threads beyond those torch already started."""
    code = (
        "import os, torch\n"
        "torch.set_num_threads(3)\n"
        "big = torch.randn(4_000_000)\n"
        "(big * big).sum()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "from fda_fast.ops import activation\n"
        "activation.forward('gelu', big, None, backend='cpu')\n"
        "after = len(os.listdir('/proc/self/task'))\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print(after - before, len({line.split()[-1] for line in maps if 'gomp' in line}))\n"
    )
    assert python(code).split() == ["0", "1"]


@LOADED
def test_instruction_sets():
    library = _native.load()
    assert library.isas()[0] == "baseline"
    assert library.isa() == library.isas()[-1]
    with pytest.raises(ValueError, match="instruction set mmx cannot run here"):
        library.use_isa("mmx")


def test_cuda_reason_says_what_is_missing():
    if _native.cuda_reason():
        assert any(
            text in _native.cuda_reason()
            for text in ("fda_fast._C is not there", "built without nvcc", "no CUDA device")
        )
    else:
        assert torch.cuda.is_available()
