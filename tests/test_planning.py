"""A plan finds what is wrong before any work and says what the work takes, from a config too."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fda_fast.calibrate import Speed, calibrate
from fda_fast.checkpoints.tensorfile import TensorFile
from fda_fast.config import load
from fda_fast.errors import InputError
from fda_fast.planning import (
    Plan,
    describe,
    is_model_config,
    plan_config,
    plan_job,
    plan_merge,
    plan_path,
)
from fda_fast.reporting import console, plan_view
from fda_fast.resources import Resources

SPEED = Speed("", 0.02, 0.05, 1e-8, 1e-8, 1e-9, 0.0, 1e9, 5e8, True, True, 50.0)
CPU = Resources("cpu")
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "torch_dtype": "bfloat16",
}


def plan(tiny, folder: Path, output: Path | None = None, **parameters: object) -> Plan:
    folder.mkdir(exist_ok=True)
    return plan_merge(load(tiny.config(folder, **parameters)), output, CPU, speed=SPEED)


def view(made: Plan) -> str:
    printer = console()
    with printer.capture() as text:
        printer.print(plan_view(made))
    return text.get()


def test_numbers_of_a_block(tiny, tmp_path: Path) -> None:
    made = plan(tiny, tmp_path, tmp_path / "out")
    assert [row.layer for row in made.rows] == ["encoder.layer.0", "encoder.layer.1"]
    row = made.rows[0]
    weights = 4 * 32 * 32 + 2 * 32 * 64
    assert (row.kind, row.anchors) == ("BertLayer", (6, 3, 32))
    assert row.parameters == weights + 4 * 32 + 64 + 32 + 4 * 32
    products = 8.5 * 2 * 18 * weights + 24 * 2 * 18 * 3 * 32
    assert row.gflop_per_step == pytest.approx(3 * products / 1e9, rel=1e-12)
    assert row.memory_bytes > 4 * row.parameters * 4
    output = 4 * sum(info.numel for info in made.job.base.names.values())
    assert made.written_bytes == output
    assert made.disk_bytes == output + 2 * 4 * (row.parameters + 3 * 6 * 3 * 32)
    assert made.seconds >= sum(row.seconds for row in made.rows) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml"]


@pytest.mark.parametrize(
    ("processor", "precision", "said"),
    [("native", "auto", True), ("native", "fp32", False), ("rounded", "auto", False)],
)
def test_says_where_bf16_would_be_faster(
    tiny, tmp_path: Path, monkeypatch, processor: str, precision: str, said: bool
) -> None:
    monkeypatch.setenv("FDA_FAST_CPU_BF16", processor)
    notes = plan(tiny, tmp_path, precision=precision).job.notes
    assert any("precision bf16" in note for note in notes) == said


def test_a_job_in_bf16_knows_how_its_products_are_made(tiny, tmp_path: Path, monkeypatch) -> None:
    found = []
    for how in ("native", "rounded"):
        monkeypatch.setenv("FDA_FAST_CPU_BF16", how)
        found.append(plan(tiny, tmp_path, precision="bf16").job.identity("merge"))
    assert [one["bf16"] for one in found] == ["native", "rounded"]
    assert "bf16" not in plan(tiny, tmp_path).job.identity("merge")


def test_more_of_everything_takes_more(tiny, tmp_path: Path) -> None:
    small, long = plan(tiny, tmp_path, steps=100, epochs=1), plan(tiny, tmp_path, steps=200)
    steps = 100 * small.rows[0].gflop_per_step * SPEED.construct_step
    assert long.rows[0].seconds - small.rows[0].seconds > 0.99 * steps
    faster = dataclasses.replace(SPEED, construct_step=SPEED.construct_step / 2)
    half = plan_job(small.job, small.limits, 0.0, faster)
    assert small.rows[0].seconds - half.rows[0].seconds == pytest.approx(steps / 2)
    narrow = plan_merge(
        load(tiny.config(tmp_path)).model_copy(update={"out_dtype": "bfloat16"}), None, CPU,
        speed=SPEED,
    )  # fmt: skip
    assert narrow.written_bytes * 2 == long.written_bytes


def test_reads_headers_and_a_few_small_tensors(tiny, tmp_path: Path, monkeypatch) -> None:
    read: list[int] = []
    original = TensorFile.read

    def counting(self, infos):
        tensors = original(self, infos)
        read.append(sum(tensor.nbytes for tensor in tensors))
        return tensors

    monkeypatch.setattr(TensorFile, "read", counting)
    made = plan(tiny, tmp_path)
    assert 0 < sum(read) < made.read_bytes / 4


def test_bad_inputs_are_found_and_nothing_is_written(tiny, tmp_path: Path, monkeypatch) -> None:
    config = load(tiny.config(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="new or empty"):
        plan_merge(config, tmp_path / "full", CPU, speed=SPEED)
    with pytest.raises(InputError, match="max_memory"):
        plan_merge(config, tmp_path / "out", Resources("cpu", max_memory=1000), speed=SPEED)
    same = config.model_copy(
        update={"models": [config.models[0].model_copy(update={"model": f"{tiny.base}/."})]}
    )
    with pytest.raises(InputError, match=r"identical.*in every layer"):
        plan_merge(same, tmp_path / "out", CPU, speed=SPEED)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="too small"):
        plan_merge(config, tmp_path / "out", CPU, speed=SPEED)
    assert sorted(tmp_path.rglob("*")) == before


def test_calibration_times_the_layer_itself(tiny, tmp_path: Path) -> None:
    made = plan(tiny, tmp_path, start="tsv")
    from fda_fast.budget import workload

    speed = calibrate(made.job, workload(made.job), tmp_path / "out")
    assert speed.layer == "encoder.layer.0"
    assert not speed.assumed_read and not speed.assumed_write
    for value in (speed.construct_step, speed.adapt_step, speed.prepare, speed.start, speed.gflops):
        assert value > 0
    assert speed.write > 1e6 and speed.read > 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml"]


def test_only_rates_that_nobody_measured_are_called_assumed(tiny, tmp_path: Path) -> None:
    """Without an output folder the base's files can still be timed, its disk cannot."""
    config = load(tiny.config(tmp_path))
    said = {output: view(plan_merge(config, output, CPU)) for output in (None, tmp_path / "out")}
    assert re.search(r"at [\d.e+]+ GB/s from the disk and an assumed 0.5 GB/s to it", said[None])
    assert "GB/s from the disk" in said[tmp_path / "out"]
    assert "assumed" not in said[tmp_path / "out"]
    said_of_both = view(plan_config(write(tmp_path), {}, resources=CPU))
    assert "at an assumed 1 GB/s from the disk and an assumed 0.5 GB/s to it" in said_of_both


def write(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA | changes))
    return path


def test_a_config_alone(tmp_path: Path) -> None:
    path = write(tmp_path)
    for given in (path, tmp_path):
        made = plan_config(given, {"anchors": 32, "steps": 5}, resources=CPU, speed=SPEED)
    assert len(made.rows) == 6 and made.rows[0].kind == "LlamaMLP"
    assert made.rows[0].parameters == 3 * 64 * 176
    parameters = sum(info.numel for info in made.job.base.names.values())
    assert made.written_bytes == 2 * parameters
    assert made.read_bytes == 3 * 2 * parameters
    wider = plan_config(path, {}, experts=5, dtype="float32", resources=CPU, speed=SPEED)
    assert wider.written_bytes == 4 * parameters and len(wider.job.experts) == 5
    assert not any("counts twice" in note for note in wider.job.notes)  # they will differ


def test_the_output_of_a_config_alone_is_checked_and_timed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    path = write(tmp_path / "model")
    with pytest.raises(InputError, match="Nothing is ever overwritten"):
        plan_path(path, tmp_path / "full", {}, resources=CPU)
    with pytest.raises(InputError, match="writable directory"):
        plan_path(path, path / "out", {}, resources=CPU)
    made = plan_path(path, tmp_path / "out", {"anchors": 8}, resources=CPU)
    assert made.speed.assumed_read and not made.speed.assumed_write
    assert not (tmp_path / "out").exists()


def test_a_number_of_experts_is_for_a_config_alone(tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--experts.*A merge's configuration names its experts"):
        plan_path(tiny.config(tmp_path), None, {}, experts=2, resources=CPU)
    with pytest.raises(InputError, match="no such file"):
        plan_path(tmp_path / "nowhere.yaml", None, {}, experts=2, resources=CPU)


def test_families_at_full_size(tmp_path: Path) -> None:
    """Shapes of 70 billion parameters cost no memory."""
    path = write(
        tmp_path, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    job = describe(path, {}, device="cpu")
    total = sum(info.numel for info in job.base.names.values())
    assert 68e9 < total < 70e9
    assert len(job.layers) == 80 and job.layers[0].numel == 3 * 8192 * 28672


def test_anchors_in_parts_are_said_and_take_longer(tmp_path: Path) -> None:
    from fda_fast.budget import host_memory, resident, workload

    path = write(tmp_path, hidden_size=1024, intermediate_size=2816)
    job = describe(path, {"anchors": 8192}, device="cpu")
    load = dataclasses.replace(workload(job), part=2048)
    limit = resident() + host_memory(job, load, overlap=False).bound + (256 << 20)
    whole, split = (
        plan_config(path, {"anchors": 8192}, resources=Resources("cpu", max_memory=m), speed=SPEED)
        for m in (1 << 40, limit)
    )
    assert whole.limits.part is None and split.limits.part == 2048
    assert split.memory_bytes < limit and split.rows[0].memory_bytes < whole.rows[0].memory_bytes
    slower = split.rows[0].gflop_per_step / whole.rows[0].gflop_per_step
    assert slower == pytest.approx(1 + 0.75 * (8 / 3) / 8.5)
    said = [view(made) for made in (whole, split)]
    assert "anchors:" not in said[0]
    assert "anchors: 2048 of 8192 at once, in 4 parts" in said[1]


def test_bad_configs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        plan_config(tmp_path / "config.json", {})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="a JSON object"):
        plan_config(tmp_path, {})
    with pytest.raises(InputError, match="llamma"):
        plan_config(write(tmp_path, model_type="llamma"), {})
    with pytest.raises(InputError, match="experts"):
        plan_config(write(tmp_path), {}, experts=0)
    with pytest.raises(InputError, match="without its weights"):
        describe(write(tmp_path), {}).base.read(["model.norm.weight"])


def test_which_files_are_model_configs(tmp_path: Path, tiny) -> None:
    assert is_model_config(write(tmp_path)) and is_model_config(tmp_path)
    merge = tmp_path / "merge.json"
    merge.write_text(json.dumps({"merge_method": "fda"}))
    assert not is_model_config(merge)
    assert not is_model_config(tiny.config(tmp_path))


def test_a_described_model_is_what_is_saved(tmp_path: Path) -> None:
    """Names, shapes and dtypes of save_pretrained; tied tensors once."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    from fda_fast.checkpoints.described import DescribedCheckpoint

    path = write(tmp_path, tie_word_embeddings=True, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).bfloat16()
    model.save_pretrained(tmp_path / "saved")
    described = DescribedCheckpoint(path)
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {n: i.shape for n, i in described.names.items()} == {
        n: tuple(t.shape) for n, t in saved.items()
    }
    assert {i.dtype for i in described.names.values()} == {torch.bfloat16}


def test_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fda_fast.cli import app

    command = ["plan", str(write(tmp_path)), "--experts", "3", "--device", "cpu", "--steps", "7"]
    done = CliRunner().invoke(app, [*command, "--set", "anchors=16", "--max-memory", "64GiB"])
    assert done.exit_code == 0, done.output
    for words in ("layers.0.mlp ... layers.5.mlp (6)", "LlamaMLP", "expert-3", "7 steps", "GB/s"):
        assert words in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
