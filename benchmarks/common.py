"""What every benchmark shares: environment stamp, interleaved timing, peak memory, result files.

Benchmarks are run as scripts (`python benchmarks/bench_x.py`), which puts this folder on the path:
`from common import ...`.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fda_fast.layers.precision import fast_bf16
from fda_fast.machine import processor

RESULTS = Path(__file__).parent / "results"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where numbers come from; every result file starts with it."""
    stamp: dict[str, Any] = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": "native" if fast_bf16() else "rounded",
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        stamp |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return stamp


def slug(name: str) -> str:
    """A folder name: "Intel(R) Xeon(R) Processor" becomes "intel-xeon-processor"."""
    plain = re.sub(r"\((r|tm|c)\)", "", name, flags=re.I)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-") or "unknown"


def _commit() -> str | None:
    """Short commit, with "+" if the tree has changes; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        answers = [
            subprocess.run(
                ["git", *command], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0] + ("+" if answers[1] else "")


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    inner: int = 1,
    synchronize: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each function, one after the other in every round.

    A busy neighbour or a clock change then hits all of them alike; compare medians.

    Args:
        functions: what to time, by name.
        repeats: rounds.
        warmup: unmeasured rounds first.
        inner: calls per measurement, for functions of microseconds.
        synchronize: e.g. torch.cuda.synchronize, called before each clock reading.
        clock: time.process_time counts this process's own processor seconds, which neighbours
            hardly disturb; use it with one thread only.
    """
    wait = synchronize or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(warmup + repeats):
        for name, function in functions.items():
            wait()
            start = clock()
            for _ in range(inner):
                function()
            wait()
            if round_index >= warmup:
                seconds[name].append((clock() - start) / inner)
    return seconds


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Median, fastest and slowest of one list, in milliseconds."""
    return {
        "ms_median": round(1e3 * statistics.median(seconds), 4),
        "ms_min": round(1e3 * min(seconds), 4),
        "ms_max": round(1e3 * max(seconds), 4),
        "repeats": len(seconds),
    }


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster ``fast`` is: median over rounds of the ratio within a round."""
    pairs = zip(seconds[slow], seconds[fast], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 2)


def peak_memory(setup: Callable[..., Callable[[], Any]], *args: Any) -> dict[str, float]:
    """Peak resident memory of a piece of work, in a process of its own.

    Args:
        setup: module-level function; builds the inputs and returns the work as a callable.
        args: its arguments, picklable.

    Returns:
        "before_mib": resident memory with the inputs built; "peak_mib": highest during the work.
        Their difference is what the work itself needed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(sender, torch.get_num_threads(), setup,
                                                          args))  # fmt: skip
    child.start()
    sender.close()
    try:
        before, peak = receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"memory measurement of {setup.__name__} failed") from error
    finally:
        child.join()
    return {"before_mib": round(before, 1), "peak_mib": round(peak, 1)}


def _measure_memory(
    sender: Any, threads: int, setup: Callable[..., Callable[[], Any]], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    work = setup(*args)
    status = Path("/proc/self/status")
    if status.exists():
        # Linux can forget the peak of the setup; elsewhere the process's whole peak counts.
        # What the setup freed goes back first, or the work would seem to need nothing.
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        work()
        sender.send((before / 1024, _status_kib("VmHWM") / 1024))
    else:
        unit = 1 << 20 if platform.system() == "Darwin" else 1 << 10
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        work()
        sender.send((before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit))


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_kib(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status lacks {key}")
    return int(found[1])


def write_json(
    name: str, payload: Mapping[str, Any], *, device: str = "cpu", folder: Path | None = None
) -> Path:
    """Write <name>.json with the environment stamp; returns the path.

    Args:
        name: of the benchmark.
        payload: everything but the stamp.
        device: "cpu" or "cuda": what the numbers are of.
        folder: where to; default results/<processor or GPU>.
    """
    stamp = environment(device)
    if folder is None:
        folder = RESULTS / slug(stamp["gpu"] if device == "cuda" else stamp["cpu"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": stamp, **payload}, indent=1) + "\n")
    return path
