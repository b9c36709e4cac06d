"""Several devices of one machine share a merge: a process each, through the work directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from fda_fast.config import MergeConfig, parse
from fda_fast.errors import InputError
from fda_fast.kept import note_kept
from fda_fast.resources import Resources, Shard, device_list
from fda_fast.work import WorkDirectory

_POLL_SECONDS = 0.2


def share(
    config: MergeConfig,
    target: Path,
    resources: Resources,
    *,
    mode: str,
    anchors: Path | None,
    restart: bool,
    progress: bool,
) -> None:
    """Let every device do its shard of the layers; they are in the work directory afterwards.

    Args:
        config: the merge.
        target: the output folder.
        resources: with several devices; memory limits count for each process.
        mode, anchors, restart, progress: as ``merge.run``; the first process shows its progress.

    Raises:
        InputError, OSError, RuntimeError: what the first process to fail says; all are stopped.
    """
    if restart:
        with WorkDirectory(target) as work:
            work.discard()
    devices = device_list(resources.device)
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for number, device in enumerate(devices, 1):
            order = {
                "config": config.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
                "output": str(target),
                "mode": mode,
                "anchors": None if anchors is None else str(anchors.absolute()),
                "device": device,
                "shard": f"{number}/{len(devices)}",
                "max_memory": resources.max_memory,
                "max_gpu_memory": resources.max_gpu_memory,
                "progress": progress and number == 1,
            }
            workers.append(_start(order))
        _wait(workers, devices)
    except (KeyboardInterrupt, RuntimeError) as error:
        note_kept(error, WorkDirectory(target), restart=restart)
        raise
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGINT)
        for worker in workers:
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()
            worker.wait()


def _start(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fda_fast.devices"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(order).encode() + b"\n")
    worker.stdin.flush()
    return worker


def _wait(workers: list[subprocess.Popen[bytes]], devices: list[str]) -> None:
    """Until all are done; the first failure ends it."""
    running = dict(enumerate(workers))
    while running:
        for index, worker in list(running.items()):
            try:
                code = worker.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            del running[index]
            if code != 0:
                _fail(worker, devices[index], code)


def _fail(worker: subprocess.Popen[bytes], device: str, code: int) -> None:
    assert worker.stdout is not None
    said = worker.stdout.read().decode(errors="replace").strip()
    try:
        kind, number, message = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        kind, number, message = "", 0, f"ended with code {code}"
    if kind == "OSError":
        raise OSError(number, message)
    if kind == "InputError":
        raise InputError(message)
    raise RuntimeError(f"the process of {device}: {message}.")


def work_on(order: dict[str, Any]) -> None:
    """Do one shard, as ``share`` ordered it."""
    from fda_fast.merge import run

    resources = Resources(
        order["device"],
        order["max_memory"],
        order["max_gpu_memory"],
        Shard.parse(order["shard"]),
    )
    run(
        parse(order["config"], where="merge"),
        order["output"],
        mode=order["mode"],
        anchors=None if order["anchors"] is None else Path(order["anchors"]),
        progress=order["progress"],
        resources=resources,
    )


def _end_with_parent() -> None:
    """End at once when the process that ordered the work is gone: its end of the pipe closes."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> int:
    """One worker: its order is a line on standard input, its error one on standard output."""
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work_on(order)
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        print(json.dumps(["InputError", 0, str(error)]))
        return 2
    except OSError as error:
        print(json.dumps(["OSError", error.errno or 0, error.strerror or str(error)]))
        return 1
    except RuntimeError as error:
        notes = " ".join(getattr(error, "__notes__", []))
        print(json.dumps(["RuntimeError", 0, f"{error} {notes}".strip()]))
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread that watches standard input holds its lock
