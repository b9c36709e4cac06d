"""The command line, in real processes where exit codes and streams matter."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fda_fast.cli import app
from fda_fast.version import __version__

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def fda(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``python -m fda_fast`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fda_fast", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    """The same commands in this process."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_merge_in_a_process(tiny, tmp_path: Path) -> None:
    done = fda("merge", tiny.config(tmp_path), tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    # Results on stdout, progress and notes on stderr, as plain lines: neither is a terminal.
    assert "encoder.layer.1" in done.stdout and "written:" in done.stdout
    assert "merging 2 layer(s)" in done.stderr and "layer 2/2 encoder.layer.1 | done" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_bad_input_is_one_line_and_exit_code_2(tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    config.write_text(config.read_text().replace('"fda"', '"fdaa"'))
    done = fda("merge", config, tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "Did you mean 'fda'?" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_reader_who_has_seen_enough_is_no_failure(tiny, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fda_fast", "inspect", str(tiny.folder / "lora")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_a_terminal_sees_bars(tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, steps=150)
    main, worker = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fda_fast", "merge", str(config), str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=worker,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(worker)
    seen = b""
    while True:
        try:
            seen += os.read(main, 4096)
        except OSError:  # the other end is closed
            break
    os.close(main)
    assert process.wait() == 0
    text = seen.decode()
    assert "layers" in text and "construct" in text and "mean cos" in text
    assert "\x1b[?25h" in text  # the cursor is given back


def test_overrides_reach_the_merge(tiny, tmp_path: Path) -> None:
    code, _, stderr = invoke(
        "merge", tiny.config(tmp_path), tmp_path / "out", "--quiet", "--steps", "3",
        "--epochs", "2", "--start", "tsv", "--seed", "5", "--set", "lr=0.02", "--keep-anchors",
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    settings = json.loads((tmp_path / "out" / "fda_report.json").read_text())["settings"]
    assert settings["construct"]["steps"] == 3
    assert settings["construct"]["lr"] == 0.02
    assert settings["construct"]["seed"] == 5
    assert settings["adapt"]["epochs"] == 2
    assert settings["start"] == "tsv"
    assert (tmp_path / "out" / "anchors" / "movie" / "encoder.layer.0.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "stpes=3"], "Did you mean 'steps'?"),
        (["--set", "steps"], "expected KEY=VALUE"),
        (["--steps", "0"], "greater than or equal to 1"),
        (["--start", "wodi"], "Did you mean 'wudi'?"),
        (["--preset", "vit-b32"], "Did you mean 'vit-b-32'?"),
        (["--device", "tpu9"], "expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_options(tiny, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, _, stderr = invoke("merge", tiny.config(tmp_path), tmp_path / "out", *arguments)
    assert code == 2
    assert said in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml"]


def test_construct_and_adapt(tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    assert invoke("construct", config, tmp_path / "anchors", "--quiet")[0] == 0
    code, _, stderr = invoke("adapt", config, tmp_path / "anchors", tmp_path / "out", "--quiet")
    assert (code, stderr) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").exists()
    (tmp_path / "anchors" / "lora" / "encoder.layer.1.safetensors").unlink()
    code, _, stderr = invoke("adapt", config, tmp_path / "anchors", tmp_path / "two", "--quiet")
    assert code == 2
    assert "no anchors of expert lora for layer encoder.layer.1" in stderr
    assert not (tmp_path / "two").exists()


def test_plan_says_what_it_takes(tiny, tmp_path: Path) -> None:
    code, stdout, _ = invoke("plan", tiny.config(tmp_path))
    assert code == 0
    for words in ("encoder.layer.1", "BertLayer", "8,544", "[6, 3, 32]", "memory:", "disk:"):
        assert words in stdout
    assert "pooler.dense.weight" in stdout  # a note on the LoRA expert
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml"]


def test_plan_refuses_what_merge_would(tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    code, _, stderr = invoke("plan", tiny.config(tmp_path), tmp_path / "out")
    assert code == 2 and "Nothing is ever overwritten" in stderr


def test_inspect(tiny, tmp_path: Path, monkeypatch) -> None:
    config = tiny.config(tmp_path)
    invoke("merge", config, tmp_path / "out", "--quiet", "--keep-anchors")
    _, stdout, _ = invoke("inspect", tmp_path / "out")
    assert "39 tensors (39 float32)" in stdout and "encoder.layer.1" in stdout
    _, stdout, _ = invoke("inspect", tmp_path / "out" / "anchors")
    assert stdout.count("[6, 3, 32]") == 6
    _, stdout, _ = invoke("inspect", tmp_path / "out" / "anchors" / "movie")
    assert stdout.count("[6, 3, 32]") == 2 and stdout.count("movie") == 2
    file = tmp_path / "out" / "anchors" / "movie" / "encoder.layer.0.safetensors"
    _, stdout, _ = invoke("inspect", file)
    assert "expert movie" in stdout and "attention.self.query.weight" in stdout
    _, stdout, _ = invoke("inspect", tiny.folder / "lora")
    assert "PEFT adapter" in stdout and "lora_A" in stdout
    code, _, stderr = invoke("inspect", tiny.folder)
    assert code == 2 and "holds folders of models. Give one of them: " in stderr
    assert all(str(folder) in stderr for folder in (tiny.base, *tiny.experts))
    code, _, stderr = invoke("inspect", tmp_path / "nowhere")
    assert code == 2 and "no such file or folder" in stderr

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fda_fast.output.write_model", stop)
    code, _, stderr = invoke("merge", config, tmp_path / "stopped", "--quiet")
    assert code == 130 and "Interrupted" in stderr
    _, stdout, _ = invoke("inspect", tmp_path / "stopped.fda-work")
    assert "unfinished merge" in stdout and stdout.count("movie, news, lora") >= 2


def test_inspect_says_what_a_file_is_that_is_no_model(tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    said = {}
    for name, content in {
        "merge.yaml": config.read_bytes(),
        "typo.yml": b"merge_methid: fda\nmodels: []\n",
        "config.json": (tiny.base / "config.json").read_bytes(),
        "other.yaml": b"a: 1\n",
        "bad.yaml": b"a: [1\n",
        "notes.txt": b"Remember the milk.\n",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    }.items():
        (tmp_path / name).write_bytes(content)
        code, stdout, said[name] = invoke("inspect", tmp_path / name)
        assert (code, stdout) == (2, "") and "ownload" not in said[name], said[name]
    for name in ("merge.yaml", "typo.yml"):
        assert "is a merge recipe" in said[name]
        assert f"`fda-fast plan {tmp_path / name}`" in said[name]
        assert f"`fda-fast merge {tmp_path / name} OUTPUT`" in said[name]
    assert "describes a model without its weights" in said["config.json"]
    for name in ("other.yaml", "bad.yaml", "notes.txt"):
        assert "got a text file" in said[name]
    assert "got a file of another kind" in said["picture.png"]


def test_a_diverging_adaptation_is_said_without_traceback(tiny, tmp_path: Path) -> None:
    code, _, stderr = invoke(
        "merge", tiny.config(tmp_path), tmp_path / "out", "--quiet", "--set", "adapt_lr=1e30"
    )
    assert code == 1
    assert "adaptation loss is not finite" in stderr and "encoder.layer.0" in stderr
    assert not (tmp_path / "out").exists()


def test_version_and_help() -> None:
    assert invoke("--version") == (0, f"fda-fast {__version__}\n", "")
    code, stdout, _ = invoke("--help")
    assert code == 0
    for command in ("merge", "construct", "adapt", "plan", "inspect"):
        assert command in stdout
