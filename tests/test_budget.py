"""Memory limits: what they choose, when they refuse, and that they are kept."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fda_fast import budget, estimate
from fda_fast.budget import choose_limits, host_memory, parse_bytes, resident, workload
from fda_fast.config import load
from fda_fast.errors import InputError
from fda_fast.job import Job, prepare
from fda_fast.planning import describe


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GiB", 6 << 30), ("800 MB", 800_000_000), ("1.5g", 1_500_000_000), (17, 17), ("2kib", 2048)],
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_bytes(text, "max_memory") == count
    assert parse_bytes(None, "max_memory") is None


@pytest.mark.parametrize("text", ["", "6 GiB of it", "-1GB", "0", "GiB", "1e9", True])
def test_bad_sizes(text: str | bool) -> None:
    with pytest.raises(InputError, match='such as "6GiB"'):
        parse_bytes(text, "max_memory")


@pytest.fixture
def big(tmp_path: Path) -> Job:
    """Llama-2-7B and two experts, as far as a config describes them."""
    content = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    return describe(tmp_path, {"anchors": 512, "steps": 5}, experts=4, device="cpu")


def test_less_memory_gives_up_the_overlap_then_refuses(big: Job) -> None:
    load = workload(big)
    ahead, alone = (host_memory(big, load, overlap=overlap) for overlap in (True, False))
    assert alone.expected < alone.bound < ahead.bound
    slack = 256 << 20  # for what this process takes and gives back meanwhile
    assert choose_limits(big, resident() + ahead.bound + slack).overlap
    between = resident() + (ahead.bound + alone.bound) // 2
    assert not choose_limits(big, between).overlap
    with pytest.raises(InputError) as refused:
        choose_limits(big, alone.bound // 2)
    for words in ("max_memory", "layers.", "4 experts", "at least", "for the program itself"):
        assert words in str(refused.value)


def test_on_the_cpu_every_expert_is_a_batch_of_its_own(big: Job) -> None:
    assert choose_limits(big, 1 << 50).batch == 1


def test_a_gpu_takes_as_many_experts_as_fit(big: Job) -> None:
    gpu = dataclasses.replace(big, device=torch.device("cuda"))
    batches = [choose_limits(gpu, None, int(n * 2**30)).batch for n in (80, 9, 7.5)]
    assert batches == sorted(batches, reverse=True) and batches[0] == 4 > batches[-1]
    assert choose_limits(gpu, None, 80 << 30).overlap
    for limit in (80 << 30, 9 << 30, 15 << 29):
        assert choose_limits(gpu, None, limit).gpu_memory <= limit
    with pytest.raises(InputError, match=r"max_gpu_memory 2\.00 GiB is too small for layer"):
        choose_limits(gpu, None, 2 << 30)


def test_more_of_everything_takes_more(big: Job) -> None:
    spec, asked = big.layers[0], workload(big)
    base = estimate.layer_memory(spec, asked)
    for more in (
        dataclasses.replace(asked, tasks=8),
        dataclasses.replace(asked, anchors=50_000),
        dataclasses.replace(asked, coefficients=4),
    ):
        assert estimate.layer_memory(spec, more).total(True) > base.total(True)
    assert estimate.layer_memory(spec, asked, group=4).work >= base.work
    assert base.total(False) < base.total(True) <= base.bound(True)


def test_a_resumed_job_keeps_its_batch_or_says_so(tiny, tmp_path: Path, monkeypatch) -> None:
    from fda_fast.merge import run
    from fda_fast.work import WorkDirectory

    config = load(tiny.config(tmp_path))
    job = prepare(config, "cpu")
    with WorkDirectory(tmp_path / "out") as work:
        work.open(job.identity("merge"), batch=3)
    with pytest.raises(InputError, match="begun with 3 experts in a batch"):
        run(config, tmp_path / "out", device="cpu", progress=False)


def test_an_impossible_budget_is_refused_before_anything(tiny, tmp_path: Path) -> None:
    from fda_fast import merge

    with pytest.raises(InputError, match="max_memory 50 MiB is too small"):
        merge(tiny.base, tiny.experts, tmp_path / "out", max_memory="50MiB", device="cpu")
    assert not list(tmp_path.iterdir())


CHILD = """
import json, sys
import torch
from fda_fast import budget
from fda_fast.config import load
from fda_fast.merge import run
from fda_fast.resources import Resources
torch.set_num_threads(1)
planned = []
choose = budget.choose_limits
def noted(*arguments):
    planned.append(choose(*arguments))
    return planned[-1]
budget.choose_limits = noted
report = run(load(sys.argv[1]), sys.argv[2], progress=False,
             resources=Resources.of("cpu", max_memory=sys.argv[3]))
print(json.dumps([report.peak_memory, planned[0].memory, planned[0].overlap, budget.peak()]))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a merge of two experts of three layers of 34 MB, float32."""
    synthetic = _synthetic()
    folder = tmp_path_factory.mktemp("wide")
    synthetic.CONFIGS["wide"] = synthetic.CONFIGS["llama-tiny"] | {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 3,
        "vocab_size": 64,
    }
    base, *experts = synthetic.make(folder, "wide")
    content = {
        "merge_method": "fda",
        "base_model": str(base),
        "models": [{"model": str(path)} for path in experts],
        "parameters": {"anchors": 32, "steps": 2, "epochs": 1},
    }
    (folder / "merge.yaml").write_text(json.dumps(content))
    return folder / "merge.yaml"


def _synthetic():
    import importlib.util

    path = Path(__file__).parents[1] / "benchmarks" / "synthetic.py"
    spec = importlib.util.spec_from_file_location("synthetic", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthetic"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pretrained", "task_arithmetic", "tsv"])
def test_a_real_merge_keeps_its_budget_as_planned(start: str, wide: Path, tmp_path: Path) -> None:
    limit = "1400MiB"
    config = tmp_path / "merge.yaml"
    content = json.loads(wide.read_text())
    config.write_text(
        json.dumps({**content, "parameters": content["parameters"] | {"start": start}})
    )
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(config), str(tmp_path / "out"), limit],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, planned, overlap, _ = json.loads(done.stdout)
    assert overlap
    assert peak < parse_bytes(limit, "limit")
    assert planned == pytest.approx(peak, rel=0.1)


def test_the_peak_is_of_this_process() -> None:
    before = budget.peak()
    block = bytearray(64 << 20)
    assert budget.peak() >= before
    assert 0 < budget.resident() <= budget.peak()
    assert len(block) == 64 << 20
