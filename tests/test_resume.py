"""Merges that die or are stopped, and what another run makes of what they left."""

from __future__ import annotations

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

from fda_fast import merge as merge_function
from fda_fast.config import load
from fda_fast.errors import InputError
from fda_fast.merge import run
from fda_fast.times import Times
from fda_fast.work import WorkDirectory

from .conftest import contents

SCRIPT = Path(__file__).with_name("kill_resume.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL: dict[str, Any] = {"anchors": 6, "tokens": 3, "steps": 8, "epochs": 5, "device": "cpu"}


def command(config: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fda_fast", "merge", str(config), str(output), *more]


def kill_resume(config: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(config), str(folder / "runs"), *more],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the child processes: the number of threads may change the last bits of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_merge(tiny, output: Path, **keywords: Any) -> Any:
    return merge_function(
        tiny.base, tiny.experts[:2], output, progress=False, **{**SMALL, **keywords}
    )


def test_killed_at_changes_of_the_disk(tiny, tmp_path: Path) -> None:
    """Every eighth rename, fsync, mkdir, ...; by hand, `--every 1` does them all."""
    done = kill_resume(tiny.config(tmp_path), tmp_path, "--everywhere", "--every", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same bytes" in done.stdout and "NOT" not in done.stdout


@pytest.mark.slow
def test_killed_at_random_times(tiny, tmp_path: Path) -> None:
    seed = str(time.time_ns() % 1000)
    config = tiny.config(tmp_path, steps=60)
    done = kill_resume(config, tmp_path, "--kills", "2", "--seed", seed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed after" in done.stdout


@pytest.mark.parametrize("more", [(), ("--restart",)])
def test_ctrl_c_keeps_work_and_says_so(tiny, tmp_path: Path, more: tuple[str, ...]) -> None:
    work = tmp_path / "out.fda-work"
    error = ctrl_c(tiny, tmp_path, "anchors/*/*.safetensors", *more, steps=500)
    again = " without --restart" if more else ""
    assert error == (
        f"error: Interrupted. Finished work is kept in {work}; the same command{again} goes on "
        "from there.\n"
    )
    assert (work / "job.json").exists()


def test_ctrl_c_before_anything_is_finished_leaves_and_promises_nothing(
    tiny, tmp_path: Path
) -> None:
    assert ctrl_c(tiny, tmp_path, "layers", steps=50000) == "error: Interrupted.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def ctrl_c(tiny, folder: Path, there: str, *more: str, steps: int) -> str:
    """What a merge says that is interrupted half a second after something is in its work."""
    config = tiny.config(folder, steps=steps)
    process = subprocess.Popen(
        command(config, folder / "out", "--quiet", *more),
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        # A job in the background of a script has Ctrl-C ignored, and so have its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not any((folder / "out.fda-work").glob(there)):
        time.sleep(0.01)
    time.sleep(0.5)  # into the construction of a layer
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (folder / "out").exists()
    return error.decode()


@pytest.mark.parametrize(
    ("kilobytes", "left"), [(2, []), (4, ["anchors"]), (48, ["anchors", "layers"])]
)
def test_a_full_disk_is_said_and_resumed(tiny, tmp_path: Path, kilobytes, left) -> None:
    """A limit on file size gives a full disk's errors: 4 kB stop the layers, 48 the model."""
    config = tiny.config(tmp_path)
    limited = f"ulimit -f {kilobytes}; exec " + " ".join(command(config, tmp_path / "out", "-q"))
    failed = subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert failed.returncode == 1, failed.stderr
    assert "make room and run the same merge again" in failed.stderr
    assert ("finished work is kept in" in failed.stderr) == bool(left)
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()
    work = tmp_path / "out.fda-work"
    found = sorted({path.relative_to(work).parts[0] for path in work.rglob("*.safetensors")})
    assert [folder for folder in found if folder != "output"] == left
    run(load(config), tmp_path / "out", device="cpu", progress=False)
    run(load(config), tmp_path / "whole", device="cpu", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not work.exists()


def interrupted(tiny, output: Path, monkeypatch, **keywords: Any) -> WorkDirectory:
    """A merge stopped between its last layer and the writing of the model."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fda_fast.output.write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            small_merge(tiny, output, **keywords)
    return WorkDirectory(output)


def test_finished_layers_are_not_done_again(tiny, tmp_path: Path, monkeypatch) -> None:
    work = interrupted(tiny, tmp_path / "out", monkeypatch)
    assert work.is_finished("encoder.layer.0") and work.is_finished("encoder.layer.1")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("constructed again")

    monkeypatch.setattr("fda_fast.layerwork.construct", never)
    report = small_merge(tiny, tmp_path / "out")
    assert [layer.seconds for layer in report.layers] == [{}, {}]
    assert report.layers[0].tasks["movie"].loss > 0  # the results of the first run
    times = Times.read(tmp_path / "out")
    assert list(times.layers) == ["encoder.layer.0", "encoder.layer.1"]  # the times too
    assert all(
        set(seconds) >= {"read", "construct", "adapt", "save"} for seconds in times.layers.values()
    )


def test_finished_anchors_are_not_made_again(tiny, tmp_path: Path, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fda_fast.pipeline.adapt_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            small_merge(tiny, tmp_path / "out")
    made: list[str] = []
    from fda_fast import layerwork

    original = layerwork.construct

    def counted(*args: Any, **keywords: Any) -> Any:
        made.append("layer")
        return original(*args, **keywords)

    monkeypatch.setattr(layerwork, "construct", counted)
    small_merge(tiny, tmp_path / "out")
    # The second layer of two experts; the first one's anchors were there.
    assert made == ["layer", "layer"]
    small_merge(tiny, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_work_of_another_merge_is_refused(tiny, tmp_path: Path, monkeypatch) -> None:
    interrupted(tiny, tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=r"settings\.construct\.steps: was 8, now 9.*--restart"):
        small_merge(tiny, tmp_path / "out", steps=9)
    assert not (tmp_path / "out").exists()
    small_merge(tiny, tmp_path / "out", steps=9, restart=True)
    small_merge(tiny, tmp_path / "whole", steps=9)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_changed_expert_is_another_merge(tiny, tmp_path: Path, monkeypatch) -> None:
    expert = tiny.copy("movie", tmp_path / "movie")
    first = {"movie": expert, "news": tiny.experts[1]}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fda_fast.output.write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_function(tiny.base, first, tmp_path / "out", progress=False, **SMALL)
    file = expert / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"experts\.movie\.model\.safetensors"):
        merge_function(tiny.base, first, tmp_path / "out", progress=False, **SMALL)


def test_two_processes_do_not_share_a_work_directory(tiny, tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "out") as other:
        other.open({"job": 1})
        with pytest.raises(InputError, match="in use by another process"):
            small_merge(tiny, tmp_path / "out", restart=True)
    assert (tmp_path / "out.fda-work" / "job.json").exists()


def test_a_folder_that_is_no_work_directory_is_left_alone(tiny, tmp_path: Path) -> None:
    foreign = tmp_path / "out.fda-work"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(InputError, match=r"files but no job\.json"):
            small_merge(tiny, tmp_path / "out", restart=restart)
    assert (foreign / "thesis.tex").read_text() == "years of work"
