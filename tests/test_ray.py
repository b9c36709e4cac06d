"""Merges on two real Ray workers of this machine; skipped where ray is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fda_fast import merge
from fda_fast.errors import InputError

from .conftest import contents

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.slow,  # a cluster is started for each
]
SMALL: dict[str, Any] = {"anchors": 6, "tokens": 3, "steps": 8, "epochs": 5, "device": "cpu"}
# A cluster of two workers of one thread each; ray warns of much that does not matter here.
DRIVER = """
    import json, os, signal, sys, time, threading
    from pathlib import Path
    import ray, torch
    from fda_fast import merge
    from fda_fast import distributed
    from fda_fast.errors import InputError

    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    if given["kill"]:
        original = distributed.do_parcel
        marker = Path(given["kill"])

        def dies_once(order, parcel):
            if parcel.index == 1:
                with marker.open("a") as file:
                    file.write("x")
                if len(marker.read_text()) == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(order, parcel)

        distributed.do_parcel = dies_once
    if given["stop"]:
        stored = distributed._store

        def dies_after(work, files):
            stored(work, files)
            os.kill(os.getpid(), signal.SIGKILL)

        distributed._store = dies_after
    try:
        merge(given["base"], given["experts"], given["out"], keep_anchors=True, progress=False,
              ray="local", **given["settings"])
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
"""


def drive(tiny, out: Path, *, kill: str = "", stop: bool = False, **settings: Any) -> Any:
    given = {
        "base": str(tiny.base),
        "experts": [str(path) for path in tiny.experts[:2]],
        "out": str(out),
        "settings": {**SMALL, **settings},
        "kill": kill,
        "stop": stop,
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER), json.dumps(given)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        timeout=300,
    )


@pytest.fixture(scope="module")
def serial(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("serial") / "out"
    merge(tiny.base, tiny.experts[:2], out, keep_anchors=True, progress=False, **SMALL)
    torch.set_num_threads(before)
    return contents(out)


def test_two_workers_give_the_serial_files_though_one_is_killed(
    tiny, tmp_path: Path, serial
) -> None:
    marker = tmp_path / "tries"
    done = drive(tiny, tmp_path / "out", kill=str(marker))
    assert done.returncode == 0, done.stderr
    assert len(marker.read_text()) >= 2  # tried again after the kill
    assert contents(tmp_path / "out") == serial


def test_a_killed_driver_is_resumed(tiny, tmp_path: Path, serial) -> None:
    stopped = drive(tiny, tmp_path / "out", stop=True)
    assert stopped.returncode == -9
    anchors = list((tmp_path / "out.fda-work" / "anchors").rglob("*.safetensors"))
    assert len(anchors) == 1  # the one task that had come back
    done = drive(tiny, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == serial


def test_errors_of_a_task_are_the_merges(tiny, tmp_path: Path) -> None:
    done = drive(tiny, tmp_path / "out", adapt_lr=1e30)
    assert done.returncode == 1
    assert "adaptation loss is not finite" in done.stderr


def test_ray_is_optional(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"fda-fast\[ray\]"):
        merge(tiny.base, tiny.experts[:2], tmp_path / "o", ray="local", progress=False, **SMALL)
