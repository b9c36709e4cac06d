"""Tests against the packages of others: each in a virtual environment on top of this one.

    python tests/peers.py                 # mergekit, fusion-bench, ray
    python tests/peers.py mergekit

Not a test file: these packages are large, pin versions of their own, and nobody needs them to work
on this project. What this environment has is seen from the new one, so only the rest is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PEERS = {
    "mergekit": ("mergekit==0.1.5", "tests/compat/test_mergekit.py"),
    "fusion-bench": ("fusion-bench==0.2.33", "tests/compat/test_fusion_bench.py"),
    "ray": ("ray>=2.40", "tests/test_ray.py"),
}


def environment(name: str, requirement: str) -> Path:
    """The interpreter of the peer's environment, made if need be."""
    folder = ROOT / "build" / "peers" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=False, clear=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ours = sysconfig.get_paths()["purelib"]
        layer = folder / "lib" / version / "site-packages" / "layer.pth"
        # Not a plain path: the .pth files in there, such as an editable install's, count too.
        layer.write_text(f"import site; site.addsitedir({ours!r})\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
        (folder / "ready").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", choices=[*PEERS, []], default=[])
    failed = []
    for name in parser.parse_args().peers or PEERS:
        requirement, tests = PEERS[name]
        python = environment(name, requirement)
        done = subprocess.run([python, "-m", "pytest", "-m", "not gpu", tests], cwd=ROOT)
        if done.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed against {', '.join(failed)}")


if __name__ == "__main__":
    main()
