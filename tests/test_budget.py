"""Memory limits: what they choose, when they refuse, and that they are kept."""

from __future__ import annotations

import dataclasses
import json
import re
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
    limits = choose_limits(big, 1 << 50)
    assert limits.batch == 1 and limits.part is None


def many(big: Job) -> Job:
    """The same with the 8192 anchors of the paper, whose activations outweigh the weights."""
    made = dataclasses.replace(big.settings.construct, anchors=8192)
    return dataclasses.replace(big, settings=dataclasses.replace(big.settings, construct=made))


def bound(job: Job, part: int | None) -> int:
    load = dataclasses.replace(workload(job), part=part)
    return host_memory(job, load, overlap=False).bound


def test_anchors_are_halved_until_they_fit(big: Job) -> None:
    job, slack = many(big), 256 << 20
    needs = {part: bound(job, part) for part in (None, 4096, 2048, 1024, 512)}
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for part in (None, 4096, 2048):
        limits = choose_limits(job, resident() + needs[part] + slack)
        assert limits.part == part
        assert limits.memory <= resident() + needs[part] + slack
    with pytest.raises(InputError, match="anchors at a time") as refused:
        choose_limits(job, resident() + needs[512] // 2)
    least = re.search(r"at least (\d+\.\d+) GiB", str(refused.value))
    assert least is not None
    # The limit that it names is enough.
    choose_limits(job, int((float(least[1]) + 0.01) * 2**30) + slack)


def test_without_a_limit_anchors_are_split_only_where_nothing_else_would_go(
    big: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = many(big)
    for free, part in ((bound(job, None) + 1, None), (bound(job, 4096) + 1, 4096)):
        monkeypatch.setattr("fda_fast.job.free_memory", lambda device, free=free: free)
        assert choose_limits(job).part == part
    # Where no part is small enough, what smaller ones would not save is not split further.
    monkeypatch.setattr("fda_fast.job.free_memory", lambda device: 1 << 20)
    smallest = choose_limits(job).part
    assert smallest is not None and bound(job, smallest // 2) > 0.98 * bound(job, smallest)


def test_on_a_gpu_one_expert_is_split_after_the_batch(big: Job) -> None:
    gpu = dataclasses.replace(many(big), device=torch.device("cuda"))
    found = [choose_limits(gpu, None, int(n * 2**30)) for n in (80, 16, 9)]
    assert [limits.batch for limits in found] == [4, 1, 1]
    assert found[0].part is None and found[2].part is not None
    for limits, gigabytes in zip(found, (80, 16, 9), strict=True):
        assert limits.gpu_memory <= gigabytes * 2**30
    with pytest.raises(InputError, match=r"and \d+ anchors of one task"):
        choose_limits(gpu, None, 4 << 30)


def test_parts_take_less_memory_and_more_operations(big: Job) -> None:
    spec, asked = big.layers[0], workload(many(big))
    memory, flop = [], []
    for part in (None, 4096, 1000, 100):
        load = dataclasses.replace(asked, part=part)
        memory.append(estimate.layer_memory(spec, load).work)
        flop.append(estimate.construct_flop(spec, load))
    assert memory == sorted(memory, reverse=True) and flop == sorted(flop)
    assert flop[-1] < 1.4 * flop[0]
    assert estimate.layer_memory(spec, dataclasses.replace(asked, part=8192)) == (
        estimate.layer_memory(spec, asked)
    )


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


def test_a_job_keeps_its_part_whatever_memory_there_is_later(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fda_fast import pipeline
    from fda_fast.merge import run

    config = load(tiny.config(tmp_path))

    def merged(name: str, *parts: int | None) -> dict[str, bytes]:
        """A merge that dies before its last layer, once for every part but the last."""
        for part in parts:
            limits = budget.Limits(1, False, 0, part=part)
            monkeypatch.setattr(budget, "choose_limits", lambda *_, limits=limits: limits)
            if part is not parts[-1]:
                with monkeypatch.context() as patch:
                    patch.setattr(pipeline, "adapt_layer", _dying(pipeline.adapt_layer))
                    with pytest.raises(MemoryError):
                        run(config, tmp_path / name, device="cpu", progress=False)
            else:
                run(config, tmp_path / name, device="cpu", progress=False)
        files = sorted((tmp_path / name).rglob("*.safetensors"))
        return {path.name: path.read_bytes() for path in files}

    whole, split = merged("whole", None), merged("split", 2)
    assert merged("resumed", 2, None) == split
    assert whole != split  # otherwise nothing was split, or nothing was resumed in parts
    with pytest.raises(InputError, match=r"begun with all anchors at once.*room for 2"):
        merged("smaller", None, 2)


def _dying(adapt_layer):
    """Adapts the first layer, then runs out of memory."""
    calls = []

    def replacement(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise MemoryError
        return adapt_layer(*arguments)

    return replacement


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
print(json.dumps([report.peak_memory, planned[0].memory, planned[0].overlap, planned[0].part]))
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


def merge_within(limit: str, wide: Path, folder: Path, **parameters: object) -> list:
    """Peak, planned peak, overlap and part of a merge in a process of its own."""
    config = folder / "merge.yaml"
    content = json.loads(wide.read_text())
    config.write_text(json.dumps({**content, "parameters": content["parameters"] | parameters}))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(config), str(folder / "out"), limit],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pretrained", "task_arithmetic", "tsv"])
def test_a_real_merge_keeps_its_budget_as_planned(start: str, wide: Path, tmp_path: Path) -> None:
    limit = "1400MiB"
    peak, planned, overlap, part = merge_within(limit, wide, tmp_path, start=start)
    assert overlap and part is None
    assert peak < parse_bytes(limit, "limit")
    assert planned == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
def test_a_real_merge_in_parts_keeps_its_budget_as_planned(wide: Path, tmp_path: Path) -> None:
    limit = "1100MiB"
    peak, planned, _, part = merge_within(limit, wide, tmp_path, anchors=3000, steps=1)
    assert part is not None
    assert peak < parse_bytes(limit, "limit")
    assert planned == pytest.approx(peak, rel=0.1)


def test_the_peak_is_of_this_process() -> None:
    before = budget.peak()
    block = bytearray(64 << 20)
    assert budget.peak() >= before
    assert 0 < budget.resident() <= budget.peak()
    assert len(block) == 64 << 20
