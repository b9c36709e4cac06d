"""Build of the optional native extension fda_fast._C; everything else is in pyproject.toml.

The C++ kernels of csrc/cpu are compiled once for each instruction set, and the machine's best is
chosen at run time, so that a wheel runs on any machine. CUDA sources (csrc/*.cu) are compiled when
nvcc is found. No torch is needed: kernels take raw pointers.

    FDA_FAST_CUDA        auto (default): CUDA when nvcc is there; 1: required; 0: left out
    FDA_FAST_CUDA_ARCHS  default "80;90a;100"; PTX of the last plain architecture is added
    CXX                  the C++ compiler (default: g++, then clang++, then c++)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# No -ffast-math: sums keep their order, and infinities and NaN their meaning. Without errno and
# floating-point traps, which nothing here reads, selections compile to vector code.
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "dq", "bw", "vl"))]
X86 = {"baseline": [], "avx2": AVX2, "avx512": [*AVX512, "-mprefer-vector-width=512"]}
NVCC = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_compiler() -> tuple[str | None, str]:
    """The C++ compiler, or None and why the extension cannot be built."""
    named = os.environ.get("CXX", "").split()
    found = next((path for name in [*named[:1], "g++", "clang++", "c++"]
                  if (path := shutil.which(name))), None)  # fmt: skip
    if found is None:
        return None, "no C++ compiler found (CXX, g++, clang++, c++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return None, f"Python.h is not in {sysconfig.get_path('include')}; install Python's headers"
    return found, ""


def find_nvcc() -> str | None:
    """nvcc, if CUDA sources are to be compiled.

    Raises:
        SystemExit: FDA_FAST_CUDA is no known value, or is 1 and nvcc is missing.
    """
    wanted = os.environ.get("FDA_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FDA_FAST_CUDA={wanted}: expected auto, 0 or 1")
    if wanted == "0":
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    found = next((path for name in [*places, "nvcc"] if (path := shutil.which(name))), None)
    if found is None:
        message = f"nvcc not found ({', '.join([*places, 'nvcc on the PATH'])})"
        if wanted == "1":
            raise SystemExit(f"FDA_FAST_CUDA=1, but {message}")
        warnings.warn(f"fda_fast: {message}; building without CUDA C++ kernels", stacklevel=2)
    return found


def gencodes(archs: str) -> list[str]:
    """nvcc's -gencode options: machine code for each architecture, PTX of the last plain one."""
    names = [name for name in archs.replace(",", ";").split(";") if name]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    plain = [name for name in names if name.isdigit()]
    if plain:
        flags.append(f"-gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}")
    return flags


class Build(build_ext):
    """Compiles every unit at once, links, and moves the result into place in one step."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link fda_fast._C."""
        import pybind11

        cxx, nvcc = find_compiler()[0], find_nvcc()
        cuda_sources = sorted(CSRC.glob("*.cu")) if nvcc else []
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        openmp = ["-fopenmp"] if accepts(cxx, ["-fopenmp"]) else []
        if not openmp:
            warnings.warn("fda_fast: the compiler has no OpenMP; one thread", stacklevel=2)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        jobs = {}
        for isa, flags in (X86 if x86 else {"baseline": []}).items():
            options = [*COMMON, *KERNEL, *openmp, *flags, f"-DFDA_ISA={isa}"]
            jobs[objects / f"cpu_{isa}.o"] = [cxx, *options, "-c", str(CSRC / "cpu" / "isa.cpp")]
        includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        bindings = [cxx, *COMMON, "-O2", *includes, "-c"]
        jobs[objects / "bindings.o"] = [*bindings, str(CSRC / "bindings.cpp")]
        if cuda_sources:
            archs = os.environ.get("FDA_FAST_CUDA_ARCHS", "80;90a;100")
            jobs[objects / "bindings.o"].append(f'-DFDA_CUDA_ARCHS="{archs}"')
            # By nvcc, which knows where its headers are.
            launchers = [nvcc, "-ccbin", cxx, *NVCC, *includes, "-c"]
            jobs[objects / "bindings_cuda.o"] = [*launchers, str(CSRC / "bindings_cuda.cpp")]
            for source in cuda_sources:
                command = [nvcc, "-ccbin", cxx, *NVCC, *gencodes(archs), "-c", str(source)]
                jobs[objects / f"cuda_{source.stem}.o"] = command
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self.call([*job[1], "-o", str(job[0])]), jobs.items()))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if cuda_sources:
            link = [nvcc, "-shared", "-cudart=static", "-ccbin", cxx, "-Xcompiler=-fPIC"]
            link += [f"-Xcompiler={flag}" for flag in openmp]
        else:
            shared = ["-bundle", "-undefined", "dynamic_lookup"]
            link = [cxx, *(shared if platform.system() == "Darwin" else ["-shared"]), *openmp]
        self.call([*link, *map(str, jobs), "-o", str(target)])

    def call(self, command: list[str]) -> None:
        """Run one command; its failure ends the build with its output."""
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stderr:
            self.warn(done.stderr)
        if done.returncode:
            raise SystemExit(f"fda_fast: failed: {' '.join(command)}\n{done.stdout}{done.stderr}")

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: replace the old file in one step, for those who have it open."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = map(Path, self._get_inplace_equivalent(build_py, ext))
            fresh = inplace.with_suffix(f".{os.getpid()}.new")
            shutil.copy2(built, fresh)
            os.replace(fresh, inplace)


def accepts(cxx: str, flags: list[str]) -> bool:
    """Whether the compiler builds and links a program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [cxx, *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def extensions() -> list[Extension]:
    """fda_fast._C, or nothing and a warning where it cannot be compiled."""
    nvcc = find_nvcc()
    cxx, why = find_compiler()
    if cxx is None:
        if nvcc and os.environ.get("FDA_FAST_CUDA") == "1":
            raise SystemExit(f"FDA_FAST_CUDA=1, but {why}")
        warnings.warn(f"fda_fast: {why}; installing without the native extension, operations "
                      "will run on their PyTorch twins (slower)", stacklevel=2)  # fmt: skip
        return []
    files = [path for path in CSRC.rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(ROOT)) for path in files)
    sources = [name for name in names if name.endswith((".cpp", ".cu"))]
    return [Extension("fda_fast._C", sources, depends=[n for n in names if n not in sources])]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
