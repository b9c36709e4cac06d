"""One merge in several processes: shards on a common disk, and several devices."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fda_fast import merge
from fda_fast.errors import InputError
from fda_fast.resources import Resources, Shard
from fda_fast.work import WorkDirectory, write_atomically

from .conftest import contents

SMALL: dict[str, Any] = {"anchors": 6, "tokens": 3, "steps": 8, "epochs": 5, "device": "cpu"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in the child processes: the number of threads may change the last bits of a sum."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_merge(tiny, output: Path, **keywords: Any) -> Any:
    return merge(tiny.base, tiny.experts[:2], output, progress=False, **{**SMALL, **keywords})


@pytest.fixture(scope="module")
def serial(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("serial") / "out"
    small_merge(tiny, out, keep_anchors=True)
    torch.set_num_threads(before)
    return contents(out)


@pytest.mark.parametrize(
    ("text", "said"), [("0/2", "from 1 to n"), ("3/2", "from 1"), ("2", "i/n"), ("a/b", "i/n")]
)
def test_bad_shards(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Shard.parse(text)


def test_shards_cover_every_layer_once() -> None:
    parts = [Shard.parse(f"{i}/3") for i in (1, 2, 3)]
    assert all(sum(part.takes(index) for part in parts) == 1 for index in range(10))


def test_ways_of_sharing_exclude_each_other() -> None:
    with pytest.raises(InputError, match="shard and ray cannot be combined"):
        Resources.of(shard="1/2", ray="local")
    with pytest.raises(InputError, match="several devices"):
        Resources.of("cuda:0,cuda:1", assemble=True)


def test_ray_is_missed_before_anything_is_read(monkeypatch) -> None:
    monkeypatch.setattr("fda_fast.resources.find_spec", lambda name: None)
    with pytest.raises(InputError, match="ray is not installed"):
        Resources.of("cpu", ray="local")


def test_shards_then_assemble_give_the_serial_files(tiny, tmp_path: Path, serial) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="2 of 2 layers are not finished"):
        small_merge(tiny, out, assemble=True)
    first = small_merge(tiny, out, shard="2/2")
    assert [layer.layer for layer in first.layers] == ["encoder.layer.1"]
    assert first.unfinished == 1 and not out.exists()
    with pytest.raises(InputError, match=r"1 of 2 layers.*encoder.layer.0 missing"):
        small_merge(tiny, out, assemble=True)
    assert small_merge(tiny, out, shard="1/2").unfinished == 0
    again = small_merge(tiny, out, shard="1/2")  # nothing left to do
    assert [layer.seconds for layer in again.layers] == [{}, {}]
    small_merge(tiny, out, assemble=True, keep_anchors=True)
    assert contents(out) == serial
    assert not (tmp_path / "out.fda-work").exists()


def test_an_ordinary_run_finishes_what_shards_left(tiny, tmp_path: Path, serial) -> None:
    small_merge(tiny, tmp_path / "out", shard="1/2")
    report = small_merge(tiny, tmp_path / "out", keep_anchors=True)
    assert [bool(layer.seconds) for layer in report.layers] == [False, True]
    assert contents(tmp_path / "out") == serial


def test_locks(tmp_path: Path) -> None:
    """Other shards share the directory; the same shard, and a whole merge, do not."""
    first, same, other, whole = (WorkDirectory(tmp_path / "out") for _ in range(4))
    first.open({"job": 1}, shard="1/2", batch=3)
    with pytest.raises(InputError, match="in use, as part 1-of-2, by another process"):
        same.open({"job": 1}, shard="1/2")
    other.open({"job": 1}, shard="2/2", batch=2)
    assert other.batch == 3  # the first one decides
    with pytest.raises(InputError, match="in use by another process"):
        whole.open({"job": 1})
    first.close()
    other.close()
    whole.open({"job": 1})
    whole.close()
    with pytest.raises(InputError, match="another merge"):
        other.open({"job": 2}, shard="2/2")


def test_two_processes_begin_at_once(tmp_path: Path) -> None:
    """Both agree on one job.json, whoever was first."""
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)

    def begin(number: int) -> None:
        work = WorkDirectory(tmp_path / "out")
        ready.wait()
        work.open({"job": 1}, shard=f"{number}/2", batch=number)
        (tmp_path / f"batch-{number}").write_text(str(work.batch))
        work.close()

    processes = [context.Process(target=begin, args=(number,)) for number in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len({(tmp_path / f"batch-{number}").read_text() for number in (1, 2)}) == 1


def test_write_without_replacing(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"first", replace=False)
    write_atomically(tmp_path / "file", b"second", replace=False)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_two_devices_give_the_serial_files(tiny, tmp_path: Path, serial) -> None:
    small_merge(tiny, tmp_path / "out", device="cpu,cpu", keep_anchors=True)
    assert contents(tmp_path / "out") == serial


def test_an_error_of_one_device_is_the_merges(tiny, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="adaptation loss is not finite"):
        small_merge(tiny, tmp_path / "out", device="cpu,cpu", adapt_lr=1e30)
    with pytest.raises(InputError, match=r"got .tpu."):
        small_merge(tiny, tmp_path / "out", device="cpu,tpu")


@pytest.mark.parametrize("pattern", ["layers", "anchors/*/*.safetensors"])
def test_ctrl_c_on_two_devices_says_what_is_kept(tiny, tmp_path: Path, pattern: str) -> None:
    config = tiny.config(tmp_path, steps=300 if "*" in pattern else 100_000)
    command = [sys.executable, "-m", "fda_fast", "merge", str(config), str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--device", "cpu,cpu", "-q"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A job in the background of a script has Ctrl-C ignored, and so have its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    work = tmp_path / "out.fda-work"
    while process.poll() is None and not any(work.glob(pattern)):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = f" Finished work is kept in {work}; the same command goes on from there."
    assert error.decode() == f"error: Interrupted.{kept if '*' in pattern else ''}\n"


def test_workers_end_with_their_parent(tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, steps=100_000)
    command = [sys.executable, "-m", "fda_fast", "merge", str(config), str(tmp_path / "out")]
    parent = subprocess.Popen([*command, "--device", "cpu,cpu", "-q"], env=ENVIRONMENT)
    work = tmp_path / "out.fda-work"
    locks = [work / f"lock-{number}-of-2" for number in (1, 2)]
    while parent.poll() is None and not all(p.exists() and p.read_text() for p in locks):
        pass
    workers = [int(path.read_text()) for path in locks]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for worker in workers:
        for _ in range(1000):
            if not _alive(worker):
                break
            signal.sigtimedwait([], 0.01)
        assert not _alive(worker)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def test_on_the_command_line(tiny, tmp_path: Path, serial) -> None:
    from typer.testing import CliRunner

    from fda_fast.cli import app

    config = tiny.config(tmp_path)
    out = tmp_path / "out"

    def merged(*options: str) -> Any:
        return CliRunner().invoke(
            app, ["merge", str(config), str(out), "--device", "cpu", *options]
        )

    first = merged("--shard", "1/2", "--max-memory", "64GiB")
    assert first.exit_code == 0 and "1 layer(s) left to other shards" in first.stdout
    second = merged("--shard", "2/2")
    assert second.exit_code == 0 and "--assemble writes the model" in second.stdout
    assert merged("--shard", "3/2").exit_code == 2
    refused = merged("--max-memory", "10MiB")
    assert refused.exit_code == 2 and "too small for layer" in refused.stderr
    assert "written:" in merged("--assemble").stdout
    assert (out / "model.safetensors").exists()
