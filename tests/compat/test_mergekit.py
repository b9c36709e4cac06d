"""The installed mergekit reads what we read and write, and its Task Arithmetic is our start."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fda_fast.config import load
from fda_fast.errors import InputError
from fda_fast.merge import run

ROOT = Path(__file__).parents[2]
FILTERS = [{"filter": "mlp", "value": [0.2, 0.8]}, {"filter": "norm", "value": 0}, {"value": 0.5}]

# What people write, each accepted by both sides.
ACCEPTED: dict[str, dict[str, Any]] = {
    "fda": {"merge_method": "fda", "dtype": "float32"},
    "start": {
        "merge_method": "fda",
        "parameters": {"start": "tsv", "steps": 400, "init": "gaussian", "scale": 0.01},
        "out_dtype": "bfloat16",
        "tokenizer_source": "base",
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "parameters": {"weight": 0.5, "lambda": 0.7, "normalize": False, "int8_mask": True},
        "dtype": "float32",
    },
    "filters and gradients": {
        "merge_method": "task_arithmetic",
        "parameters": {
            "weight": FILTERS,
            "lambda": [{"filter": "attn", "value": 0.5}, {"value": 1}],
        },
        "dtype": "float32",
    },
    "weights from a word": {"merge_method": "task_arithmetic", "parameters": {"weight": "5e-1"}},
    "tokenizer": {"merge_method": "fda", "tokenizer": {"source": "base"}},
}
# What mergekit runs and FDA has no meaning for, with the word that says why.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ties": ({"merge_method": "ties"}, "TIES"),
    "dare": ({"merge_method": "dare_ties"}, "DARE"),
    "density": ({"merge_method": "fda", "parameters": {"density": 0.5}}, "density"),
    "normalize": ({"merge_method": "fda", "parameters": {"normalize": True}}, "normalise"),
    "union": ({"merge_method": "fda", "tokenizer_source": "union"}, "tokenizer_source"),
    "template": ({"merge_method": "fda", "chat_template": "auto"}, "chat template"),
    "filtered steps": (
        {"merge_method": "fda", "parameters": {"steps": [{"filter": "mlp", "value": 3}]}},
        "one value for the whole model",
    ),
}

PARSE = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
for text in json.load(sys.stdin):
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    print(config.merge_method, len(config.models), config.base_model)
"""
MERGE = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
run_merge(config, sys.argv[2], MergeOptions(quiet=True, copy_tokenizer=False))
"""

needs_mergekit = pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed"
)


def mergekit(script: str, *arguments: str, text: str = "") -> str:
    """Output of a script in a process of its own: mergekit patches torch's unpickler."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny Llama and two fine-tunes of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("math", "code"):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(before[key] + 0.01 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return [folder / name for name in ("base", "math", "code")]


def content(models: list[Path], rest: dict[str, Any]) -> dict[str, Any]:
    base, *experts = map(str, models)
    return {"base_model": base, "models": [{"model": expert} for expert in experts], **rest}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(llamas: list[Path], tmp_path: Path, case: str) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(content(llamas, ACCEPTED[case])))
    assert len(load(path).models) == 2


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(llamas: list[Path], tmp_path: Path, case: str) -> None:
    rest, said = REFUSED[case]
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(content(llamas, rest)))
    with pytest.raises(InputError, match=said):
        load(path)


def documented() -> list[str]:
    """Every YAML of the documentation, the examples and the tests that is a merge."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [b for p in pages for b in re.findall(r"```yaml\n(.*?)```", p.read_text(), re.S)]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        blocks += re.findall(r'YAML = """\\\n(.*?)"""', path.read_text(), re.S)
    blocks += [p.read_text() for p in sorted((ROOT / "examples").rglob("*.yaml"))]
    return [block for block in blocks if re.search(r"^merge_method", block, re.M)]


@needs_mergekit
def test_mergekit_parses_every_yaml_we_accept(llamas: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(content(llamas, ACCEPTED["filters and gradients"])))
    run(load(path), tmp_path / "out", progress=False)
    written = (tmp_path / "out" / "mergekit_config.yml").read_text()
    texts = [yaml.safe_dump(content(llamas, rest)) for rest in ACCEPTED.values()]
    found = documented()
    assert len(found) >= 4
    texts += [*found, written]
    lines = mergekit(PARSE, text=json.dumps(texts)).splitlines()
    assert len(lines) == len(texts)


def factor(case: str, name: str) -> float:
    """weight * lambda of the two cases below, by hand."""
    if case == "task_arithmetic":
        return 0.5 * 0.7
    layer = re.search(r"layers\.(\d)", name)
    if "mlp" in name and layer:
        return 0.2 + 0.6 * int(layer[1]) / 3
    return 0.0 if "norm" in name else 0.5 * (0.5 if "attn" in name else 1.0)


@needs_mergekit
@pytest.mark.parametrize("case", ["task_arithmetic", "filters and gradients"])
def test_task_arithmetic_agrees_to_rounding(llamas: list[Path], tmp_path: Path, case: str) -> None:
    """Ours is the exact sum rounded once; mergekit rounds every step of it in float32."""
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(content(llamas, ACCEPTED[case])))
    mergekit(MERGE, str(path), str(tmp_path / "theirs"))
    run(load(path), tmp_path / "ours", progress=False)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    base, *experts = (load_file(folder / "model.safetensors") for folder in llamas)
    half = torch.finfo(torch.float32).eps / 2  # the relative error of one rounding
    largest, different = 0.0, 0
    for name, tensor in theirs.items():
        # Task vectors as float32 differences, as both sides take them.
        moves = [factor(case, name) * (e[name] - base[name]).double() for e in experts]
        gold = base[name].double() + sum(moves)
        assert bool(((ours[name] - gold).abs() <= 1.0001 * half * gold.abs()).all()), name
        # Theirs: weight, product, sum, lambda, product; then the sum with the base.
        steps = sum(move.abs() for move in moves)
        assert bool(((tensor - gold).abs() <= half * (5 * steps + 1.01 * gold.abs())).all()), name
        largest = max(largest, float((ours[name] - tensor).abs().max()))
        different += int((ours[name] != tensor).sum())
    count = sum(t.numel() for t in theirs.values())
    print(f"\n{case}: at most {largest:.1e} apart, {different} of {count} numbers differ")
