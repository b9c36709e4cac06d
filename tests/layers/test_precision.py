"""Rounding of operands, and programs whose operands are bfloat16 tensors."""

from __future__ import annotations

import pytest
import torch
from layer_stacks import STACKS, make_anchors, make_layers
from precisions import PRECISIONS

from fda_fast.errors import InputError
from fda_fast.layers.autograd import AutogradProblem
from fda_fast.layers.linear import gram_is_cheaper
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import (
    Precision,
    fast_bf16,
    multiplies_bf16,
    resolve,
    round_bf16,
    round_tf32,
)
from fda_fast.layers.problem import ProgramProblem


def test_names():
    assert [resolve(name, "cpu") for name in ("auto", "fp32", "tf32", "bf16")] == [
        "fp32",
        "fp32",
        "tf32",
        "bf16",
    ]
    with pytest.raises(InputError, match="fp16"):
        resolve("fp16", "cpu")


@pytest.mark.parametrize("rounding, bits", [(round_tf32, 10), (round_bf16, 7)])
def test_rounds_to_nearest_even(rounding, bits):
    step = 2.0**-bits
    x = torch.tensor([1.0, 1 + step, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -1 - step / 2])
    expected = torch.tensor([1.0, 1 + step, 1.0, 1 + 2 * step, 1 + step, -1.0])
    assert torch.equal(rounding(x), expected)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x * 1e-30, x, x * 1e30])
    rounded = rounding(x)
    assert torch.equal(rounding(rounded), rounded)
    assert ((rounded - x).abs() <= x.abs() * step / 2).all()
    assert rounding(torch.tensor([0.0, torch.inf])).tolist() == [0.0, torch.inf]


def test_float64_is_never_rounded():
    x = torch.randn(3, 4, dtype=torch.float64)
    assert Precision("bf16").operand(x) is x


CPUINFO = "processor\t: 0\nvendor_id\t: {}\nmodel name\t: some\nflags\t\t: fpu avx512f {}\n"


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", "avx512_bf16", True),
        ("AuthenticAMD", "avx512_vnni", False),
        ("GenuineIntel", "avx512_bf16", False),
        ("GenuineIntel", "avx512_bf16 amx_bf16", True),
    ],
)
def test_processors_that_multiply_bfloat16(vendor, flags, expected):
    described = CPUINFO.format(vendor, flags)
    assert multiplies_bf16(described * 2) is expected


def test_a_machine_that_describes_itself_otherwise_imitates():
    assert not multiplies_bf16("Features\t: fp asimd bf16\n")


def test_the_environment_overrules_the_processor(monkeypatch):
    for wanted, narrow in (("native", True), ("rounded", False)):
        monkeypatch.setenv("FDA_FAST_CPU_BF16", wanted)
        precision = Precision("bf16")
        assert fast_bf16() is narrow is precision.narrow
        assert precision.imitates is not narrow
        assert precision.operand(torch.ones(2)).dtype == (
            torch.bfloat16 if narrow else torch.float32
        )
    monkeypatch.setenv("FDA_FAST_CPU_BF16", "yes")
    with pytest.raises(InputError, match="auto, native or rounded"):
        Precision("bf16")


def test_only_bf16_has_narrow_operands():
    for name, precision in PRECISIONS.items():
        assert precision.narrow == (name == "bf16 native")
        assert precision.imitates == (name in ("tf32", "bf16"))


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("stack", list(STACKS))
def test_operands_in_bfloat16(stack, tasks, form):
    sizes = {"d": 48, "h": 96}
    layer, finetuned = make_layers(stack, tasks, 1e-3, dtype=torch.float32, **sizes)
    wide = make_layers(stack, tasks, 1e-3, dtype=torch.float32, **sizes)
    anchors = make_anchors(tasks, 12, 4, 48, dtype=torch.float32)
    oracle = AutogradProblem(wide[0].double(), [f.double() for f in wide[1]])
    exact = oracle.evaluate(anchors.double())
    materials = Materials(layer, finetuned, tokens=4, precision=PRECISIONS["bf16 native"])
    ours = ProgramProblem(layer.program(materials, form=form), materials).evaluate(anchors)
    assert ours.grad.dtype == torch.float32
    assert (ours.grad - exact.grad).norm() <= 2e-2 * exact.grad.norm()
    assert (ours.cosines - exact.cosines).abs().max() <= 5e-3


def test_gram_form_is_for_few_rows():
    # 3 R i o against 2 R^2 (i + o): equal at R = 1.5 i o / (i + o), 576 rows of a square of 768
    assert gram_is_cheaper(320, 768, 768)
    assert not gram_is_cheaper(576, 768, 768)
    assert not gram_is_cheaper(3200, 768, 3072)
