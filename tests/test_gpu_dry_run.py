"""The benchmark of a GPU, counted without one: its rows, and the memory that its targets name."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import dry_run
from bench_step import variants
from cases import CASES, GPU_CASES

from fda_fast import estimate


def test_the_rows_are_those_of_the_targets():
    shapes = {name: (CASES[name].shape, CASES[name].tasks) for name in GPU_CASES}
    assert shapes == {
        "llama2_13b_mlp": ((8192, 5120), 1),
        "vit_l14_block": ((64, 257, 1024), 1),
        "vit_b32_block": ((64, 50, 768), 1),
        "roberta_base_layer": ((64, 5, 768), 1),
        "roberta_base_layer_x8": ((64, 5, 768), 8),
        "llama_70b_mlp": ((8192, 8192), 1),
    }
    engines = {(engine, precision) for engine, precision, _ in variants("cuda", True)}
    assert engines == {
        *(("fda_fast", p) for p in ("fp32", "tf32", "bf16")),
        *(("compiled", p) for p in ("fp32", "tf32", "bf16")),
        ("published", "fp32"),
        ("published", "tf32"),
        ("fda_fast_parts", "bf16"),
    }


def test_operations_of_a_swiglu_step():
    """25 products of 2 N d h operations, as docs and targets count them."""
    card = dry_run.count_ours(CASES["llama2_13b_mlp"], "bf16")
    assert card.flops == 25 * 2 * 8192 * 5120 * 13824
    assert set(card.products) == {torch.bfloat16}


def test_memory_of_the_largest_layers():
    ours = dry_run.count_ours(CASES["llama_70b_mlp"], "bf16")
    assert ours.peak <= 40e9
    case = CASES["llama2_13b_mlp"]
    published = dry_run.count_published(case)
    parts = dry_run.count_ours(case, "bf16", case.shape[0] // dry_run.PARTS)
    assert parts.peak - parts.given <= (published.peak - published.given) / 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["llama2_13b_mlp", "llama_70b_mlp", "vit_l14_block", "vit_b32_block"]
)
def test_what_a_plan_says_of_a_card(name, precision):
    """Within a tenth of the tensors that a step holds there."""
    case = CASES[name]
    layer, _, (anchors, *tokens, width) = dry_run.shapes_of(case)
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    spec = SimpleNamespace(
        scope="mlp" if "mlp" in name else "block",
        shapes=shapes,
        numel=sum(p.numel() for p in layer.parameters()),
        width=width,
    )
    load = estimate.Workload(1, anchors, tokens[0] if tokens else 1, steps=1)
    planned = estimate.construct_bytes(spec, load, gpu_precision=precision)
    card = dry_run.count_ours(case, precision)
    given = sum(estimate.parameter_bytes(spec) for _ in range(2))
    assert planned == pytest.approx(card.peak - given, rel=0.1)
