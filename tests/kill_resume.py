"""Kill merges with SIGKILL, run them again, and compare what comes out with an undisturbed run.

    python tests/kill_resume.py CONFIG.yaml FOLDER --kills 10     # at random times, real commands
    python tests/kill_resume.py CONFIG.yaml FOLDER --everywhere   # before every change of the disk

FOLDER receives the outputs. Exit code 0 if every byte of every file agrees.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

KEEP = ["--keep-anchors", "--quiet", "--device", "cpu"]


def digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of every file below ``folder`` but that of the times."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "fda_times.json":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


def command(config: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "fda_fast", "merge", str(config), str(output), *KEEP]


def finished(output: Path) -> tuple[int, int]:
    """Number of finished anchors files and layers in the work directory."""
    work = output.parent / f"{output.name}.fda-work"
    anchors = len(list(work.glob("anchors/*/*.safetensors")))
    return anchors, len(list(work.glob("layers/*.safetensors")))


def random_kills(config: Path, folder: Path, kills: int, seed: int) -> bool:
    """Start the command, kill it at a random time of its work; as often as asked, then let it be.

    Starting the interpreter and loading packages takes longer than a small merge, so the time is
    counted from the moment the process takes the work directory's lock.
    """
    rng = random.Random(seed)
    span = _work_seconds(config, folder / "undisturbed" / "out")
    wanted = digest(folder / "undisturbed" / "out")
    print(f"undisturbed: {wanted[:16]}, {span:.2f} s of work")
    agree, output = True, folder / "killed-0" / "out"
    left, attempts = kills, 0
    while left and attempts < 5 * kills:
        attempts += 1
        delay = rng.uniform(0, span)
        process = subprocess.Popen(command(config, output))
        _wait_for_work(process, output)
        _wait_for_output(process, output, delay)
        if output.exists():  # too late to kill: this one is compared, and another one begun
            process.wait()
            agree &= digest(output) == wanted
            print(f"finished before {delay:.2f} s: {digest(output)[:16]}", flush=True)
            output = folder / f"killed-{attempts}" / "out"
            continue
        process.kill()
        process.wait()
        left -= 1
        anchors, layers = finished(output)
        print(
            f"killed after {delay:.2f} s: {anchors} anchors, {layers} layers finished", flush=True
        )
    if not output.exists():
        subprocess.run(command(config, output), check=True)
    agree &= digest(output) == wanted
    print(f"resumed:     {digest(output)[:16]}")
    return agree and left == 0


def _work_seconds(config: Path, output: Path) -> float:
    process = subprocess.Popen(command(config, output))
    _wait_for_work(process, output)
    begun = time.monotonic()
    _wait_for_output(process, output, 3600)
    seconds = time.monotonic() - begun
    if process.wait() != 0:
        raise SystemExit("the merge fails undisturbed")
    return seconds


def _wait_for_output(process: subprocess.Popen[bytes], output: Path, at_most: float) -> None:
    end = time.monotonic() + at_most
    while process.poll() is None and not output.exists() and time.monotonic() < end:
        time.sleep(0.002)


def _wait_for_work(process: subprocess.Popen[bytes], output: Path) -> None:
    lock = output.parent / f"{output.name}.fda-work" / "lock"
    while process.poll() is None:
        if lock.exists() and lock.read_text().strip() == str(process.pid):
            return
        time.sleep(0.002)


def everywhere(config: Path, folder: Path, every: int) -> bool:
    """Kill before the first change of the disk, before the second, and so on, each time resuming.

    With ``every`` above 1 only each so many-th change.

    One interpreter loads the packages and forks; a child counts the calls that change the disk and
    kills itself before number n. A run that survives n calls has finished.
    """
    import torch

    from fda_fast.config import load
    from fda_fast.merge import run

    torch.set_num_threads(1)  # threads of a pool do not survive a fork
    settings = load(config)

    def merge(output: Path) -> None:
        run(settings, output, device="cpu", keep_anchors=True, progress=False)

    merge(folder / "undisturbed" / "out")  # not in a child: what it loads, all children have
    wanted = digest(folder / "undisturbed" / "out")
    agree, n, kills = True, 1 - every, 0
    while True:
        n += every
        output = folder / f"killed-{n}" / "out"
        code = _fork(lambda: _killing(n, merge, output))  # noqa: B023
        if code == 0:
            break
        if code != -signal.SIGKILL:
            print(f"kill {n}: the merge failed by itself")
            return False
        kills += 1
        if output.exists() and digest(output) != wanted:
            print(f"kill {n}: an incomplete output is visible")
            agree = False
        if not output.exists() and _fork(lambda: merge(output)) != 0:  # noqa: B023
            print(f"kill {n}: cannot be resumed")
            agree = False
        if output.exists() and digest(output) != wanted:
            print(f"kill {n}: other bytes")
            agree = False
    print(f"{kills} kills before changes of the disk: {'same' if agree else 'NOT the same'} bytes")
    return agree and kills > 5


def _killing(n: int, merge: Callable[[Path], None], output: Path) -> None:
    left = n

    def guarded(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    # Counted in whatever thread they happen: layers are saved beside the computation.
    calls = ("replace", "rename", "link", "fsync", "rmdir", "unlink", "mkdir", "posix_fallocate")
    for name in calls:
        setattr(os, name, guarded(getattr(os, name)))
    merge(output)


def _fork(work: Callable[[], None]) -> int:
    """Exit code of ``work`` in a child; minus the signal if one killed it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--everywhere", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    given = parser.parse_args()
    if given.everywhere:
        agree = everywhere(given.config, given.folder, given.every)
    else:
        agree = random_kills(given.config, given.folder, given.kills, given.seed)
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
