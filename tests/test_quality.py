"""A slice of the quality suites in small, and the committed results against README and figures."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT / "benchmarks" / "quality", ROOT / "benchmarks", ROOT / "examples"]
TINY = {
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Imports a script the way it finds its neighbours when it is run; an empty cache."""
    monkeypatch.setenv("FDA_FAST_CACHE", str(tmp_path))
    for folder in reversed(FOLDERS):
        monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    ours = {path.stem for folder in FOLDERS for path in folder.glob("*.py")}
    for name in ours & sys.modules.keys():
        del sys.modules[name]


@pytest.fixture
def suite(module):
    """Two tasks of random images whose brightness tells the class, and a ViT of two layers."""
    images, vision = module("images"), module("vision")
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> object:
        y = torch.randint(2, (count,), generator=generator)
        x = torch.randn(count, 1, 28, 28, generator=generator) + y.view(-1, 1, 1, 1)
        return images.Images(x, y)

    tasks = {n: images.ImageTask(2, *map(split, (64, 16, 32))) for n in ("one", "two")}
    fit = {"epochs": 2, "batch": 16, "lr": 3e-3, "weight_decay": 0.0}
    data = tasks["one"].train
    return vision.VisionSuite(tasks=tasks, pretraining=data, model=TINY, pretrain=fit, finetune=fit)


def test_experts_share_everything_but_their_layers(suite) -> None:
    base = suite.pretrained.state_dict()
    for expert in suite.experts.values():
        for name, tensor in expert.state_dict().items():
            assert torch.equal(tensor, base[name]) == ("layers." not in name), name
    assert suite.score_experts("test").keys() == {"one", "two"}
    assert statistics.fmean(suite.score_experts("test").values()) > 0.8


def test_a_suite_is_trained_once(suite, module) -> None:
    stored = module("stored")
    before = {path: path.stat().st_mtime_ns for path in suite.where.glob("*.safetensors")}
    assert len(before) == 3
    used = suite.record["experts"]["one"]["settings"]
    again = type(suite)(
        tasks=suite.data, model=TINY, pretrain=used["pretrain"], finetune=used["finetune"]
    )
    assert again.record == suite.record
    assert {path: path.stat().st_mtime_ns for path in before} == before
    damaged = next(iter(before))
    damaged.write_bytes(b"x")
    settings = json.loads(damaged.with_suffix(".json").read_text())["settings"]
    made = {"w": torch.ones(2)}
    name = damaged.stem.rsplit("-", 1)[0]
    found, record = stored.tensors(suite.where, name, settings, lambda: (made, {"note": 1}))
    assert torch.equal(found["w"], made["w"])
    assert record["sha256"] == stored.file_hash(damaged)


def test_the_whole_run_in_small(suite, module) -> None:
    run, tables = module("run"), module("tables")
    suite.anchors, suite.tokens, suite.steps = 4, 3, 5
    suite.grid = module("suite").Grid(
        scalings=(0.3, 1.0),
        wudi_rates=(1e-5,),
        distances=("l2",),
        weights=((1e-3,), (1, 2)),
        coefficients=((1e-2,), (1,)),
        published={
            start: {"distance": "cosine", "lr": 1e-3, "epochs": 1}
            | ({"scaling": 0.3} if start != "pretrained" else {})
            for start in run.STARTS
        },
    )
    rows = run.run(run.Runner(suite), seeds=2)
    sizes = {t: {"test": suite.count(t, "test")} for t in suite.tasks}
    result = {"suite": suite.name, "tasks": sizes, "rows": rows}
    head, cells = tables.method_table(result)
    methods = [line[0] for line in cells]
    assert len(set(methods)) == len(methods) == 5 + 2 * 5 + 5
    assert all(len(line) == len(head) for line in cells)
    assert len(tables.claims(result)) == 2 * 5 + 4
    assert run.run(run.Runner(suite), seeds=2) == rows  # everything was stored


def test_trajectory_is_construct(suite, module) -> None:
    import fda_fast

    methods, trajectory = module("methods"), module("trajectory")
    layer, experts = suite.layers(suite.pretrained)[0], suite.experts_at(0)
    settings = {"init": "gaussian", "scale": 0.5, "anchors": 4, "tokens": 3, "seed": 1}
    first = methods.first_anchors(experts, 0, settings)
    kept, history = trajectory.trajectory(layer, experts, first, steps=12)
    found = fda_fast.construct(layer, experts, first, steps=12, progress=False)
    assert sorted(kept) == [1, 10, 12]
    assert torch.equal(kept[1], first)
    assert torch.equal(kept[12], found.anchors)
    assert torch.equal(history, found.history)
    opposite, worse = trajectory.trajectory(layer, experts, first, steps=12, sign="paper")
    count = len(list(layer.parameters()))
    torch.testing.assert_close(worse[0], 2 * count - history[0])
    away = fda_fast.alignment(layer, experts[0], opposite[12][0]).loss
    assert away > history[0, 0] > found.loss[0]


def test_regmean_answers_as_the_expert_does(suite, module) -> None:
    regmean = module("regmean").regmean
    experts = suite.experts_at(1)
    inputs = [suite.real_inputs(task, 1, 16) for task in suite.tasks]
    assert inputs[0].shape == (16, 5, 16)
    for full in (0.9, 1.0):
        alone = regmean(experts[:1], inputs[:1], off_diagonal=full)
        for name, parameter in experts[0].named_parameters():
            torch.testing.assert_close(alone[name], parameter, rtol=1e-4, atol=1e-4)
    merged = regmean(experts, inputs, off_diagonal=1.0)
    weight = "mlp.fc1.weight"
    plain = torch.stack([dict(e.named_parameters())[weight] for e in experts]).mean(0)

    def error(candidate: torch.Tensor) -> float:
        """Summed squared distance to the experts' answers at the map's own inputs."""
        total = 0.0
        for expert, x in zip(experts, inputs, strict=True):
            seen: list[torch.Tensor] = []
            hook = expert.mlp.fc1.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            expert(x)
            hook.remove()
            difference = dict(expert.named_parameters())[weight] - candidate
            total += float((seen[0] @ difference.T).square().sum())
        return total

    assert error(merged[weight]) < error(plain)


def test_committed_results_are_in_the_documents(module) -> None:
    report, tables = module("report"), module("tables")
    results = report.results("quality-vision")
    assert results, "no committed quality-vision.json"
    readme, evidence = (path.read_text() for path in (report.README, report.EVIDENCE))
    for result in results:
        assert result["seeds"] >= 3
        for row in result["rows"]:
            assert f"| {tables.name_of(row)} |" in evidence
            assert set(row["scores"]) == set(result["tasks"])
        for claim in tables.claims(result):
            assert claim[3] in ("confirmed", "contradicted", "no difference")
            assert f"| {' | '.join(claim)} |" in evidence
    assert report.filled(readme) == readme
    assert report.filled(evidence, report.EVIDENCE_SECTIONS) == evidence


def test_verdicts_need_more_than_the_error(module) -> None:
    verdict = module("tables").verdict
    assert verdict([1.0, 1.1, 0.9], error=0.2) == "confirmed"
    assert verdict([-1.0, -1.1, -0.9], error=0.2) == "contradicted"
    assert verdict([1.0, 1.1, 0.9], error=0.6) == "no difference"
    assert verdict([3.0, -1.0, 1.0], error=0.1) == "no difference"


def test_the_error_of_a_difference_is_that_of_its_examples(module) -> None:
    tables, pack = module("tables"), module("suite").pack
    right = torch.rand(101, generator=torch.Generator().manual_seed(0)) > 0.3
    better = right.clone()
    better[~right.cumsum(0).bool() | (torch.arange(101) % 10 == 0)] = True
    assert torch.equal(torch.from_numpy(tables.unpack(pack(right), 101)), right)
    result = {"tasks": {"one": {"test": 101}}}
    rows = [{"right": {"one": [pack(found)]}} for found in (better, right)]
    expected = 100 * float((better.double() - right.double()).std()) / 101**0.5
    assert tables.sampling_error(result, *rows) == pytest.approx(expected)
    assert tables.sampling_error(result, rows[0], rows[0]) == 0


def test_every_ablation_has_a_title_and_a_section(module) -> None:
    names = module("ablate").ABLATIONS.keys()
    assert names == module("figures").TITLES.keys()
    assert {f"ablate-{name}" for name in names} <= module("sections").EVIDENCE.keys()


def test_figures_are_drawn(module, tmp_path: Path) -> None:
    figures = module("figures")
    rows = [
        {"method": name, "scores": {"one": [value], "two": [value]}}
        for name, value in (("pretrained", 0.5), ("individual experts", 0.9))
    ]
    figures.quality(
        [{"suite": "vision", "tasks": ["one", "two"], "rows": rows}], tmp_path / "q.png"
    )
    points = [{"label": "a", "pretrained": [50.0, 51.0], "task_arithmetic": [52.0, 52.0]}]
    figures.ablations([{"ablation": "sign", "rows": points}], tmp_path / "a.png")
    for name in ("q.png", "a.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
