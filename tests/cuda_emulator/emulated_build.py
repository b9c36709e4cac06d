"""The CUDA sources of csrc/, rewritten and compiled by g++ into a Python module that runs them."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
RUNTIME = [HERE / name for name in ("scheduler.cpp", "accesses.cpp")]
MODULE = HERE / "module.cpp"
GXX, NVCC = shutil.which("g++"), shutil.which("nvcc")

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
# accesses.cpp has the functions that -fsanitize=thread calls; ThreadSanitizer is not linked.
KERNELS = ["-O1", "-fsanitize=thread,undefined", "-Wno-unknown-pragmas", "-include", "emulator.h"]

_LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\(", re.DOTALL)
_SHARED = re.compile(r"__shared__ (\w+) (\w+)\[(\w+)\];")


def missing() -> str:
    """Why the emulator cannot be built here, or ""."""
    if sys.platform != "linux" or GXX is None:
        return "g++ is not on the PATH"
    return "" if NVCC else "nvcc, which knows where CUDA's headers are, is not on the PATH"


def rewrite(source: str, path: Path) -> str:
    """C++ that means what this CUDA source means.

    Raises:
        ValueError: something of CUDA is in it that the emulator does not know.
    """
    text = _LAUNCH.sub(r'::emulator::Launcher("\1", \2)(\1, ', source)
    text = _SHARED.sub(r"auto& \2 = ::emulator::shared<\1[\3]>(__COUNTER__);", text)
    for left in ("<<<", "__shared__"):
        if left in text:
            raise ValueError(f"{path.name}: the emulator does not understand its use of {left}")
    return f'#line 1 "{path}"\n{text}'


class Emulator:
    """Compiled parts in a folder, linked into modules as wanted.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        python = ["-O0", f"-I{sysconfig.get_path('include')}", f"-I{_pybind11()}"]
        self._objects = [self._plain(path, ["-O2"]) for path in RUNTIME]
        self._objects.append(self._plain(MODULE, python))
        self._kernels = {path.name: self._kernel(path, CSRC, folder) for path in SOURCES}

    @functools.cached_property
    def module(self) -> ModuleType:
        """The sources as they are."""
        return self._load([*self._objects, *self._kernels.values()], self._folder)

    def mutant(self, number: int, source: str, file: str, old: str, new: str) -> ModuleType:
        """``source`` compiled after a change in ``file``, the other sources as they are.

        Raises:
            ValueError: ``old`` is not in the file exactly once.
        """
        folder = self._folder / f"mutant{number}"
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc)
        text = (csrc / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file} has {text.count(old)} times {old!r}, expected once")
        (csrc / file).write_text(text.replace(old, new))
        changed = self._kernel(csrc / source, csrc, folder)
        others = [path for name, path in self._kernels.items() if name != source]
        return self._load([*self._objects, changed, *others], folder)

    def _plain(self, path: Path, options: list[str]) -> Path:
        return self._compile(path, self._folder / f"{path.stem}.o", [*options, f"-I{CSRC}"])

    def _kernel(self, path: Path, csrc: Path, folder: Path) -> Path:
        rewritten = folder / f"{path.stem}.cpp"
        rewritten.write_text(rewrite(path.read_text(), path))
        return self._compile(rewritten, folder / f"{path.stem}.o", [*KERNELS, f"-I{csrc}"])

    def _compile(self, source: Path, to: Path, options: list[str]) -> Path:
        command = [GXX, *COMMON, *options, f"-I{HERE}", *cuda_headers()]
        _call([*command, "-c", str(source), "-o", str(to)])
        return to

    def _load(self, objects: list[Path], folder: Path) -> ModuleType:
        path = folder / "emulated.so"
        # Its own copy of the sanitizer, which reports to this module's scheduler.
        sanitizer = ["-fsanitize=undefined", "-static-libubsan"]
        _call([GXX, "-shared", *map(str, objects), *sanitizer, "-o", str(path)])
        # Several may be loaded, so each has a name of its own; its last part is the C++ side's.
        name = f"{folder.name}.emulated"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@functools.cache
def cuda_headers() -> list[str]:
    """Options with the toolkit's include folders, from nvcc itself."""
    command = [NVCC, "--dryrun", "-E", "-x", "cu", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # Not -I: warnings in CUDA's own headers are not ours.
    folders = re.findall(r'"(?:-I)?(/[^"]*/include[^"]*)"', said)
    return [f"-isystem{folder}" for folder in dict.fromkeys(folders)]


def _pybind11() -> str:
    import pybind11

    return pybind11.get_include()


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
