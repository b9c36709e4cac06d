"""Task vectors kept as thin factors: the same numbers, no worse error, nothing dense formed."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from blocks import in_float64, make_blocks
from torch import nn

from fda_fast import layers
from fda_fast.errors import InputError
from fda_fast.layers.factored import attach_factors, factors_of
from fda_fast.layers.linear import Linear
from fda_fast.testing import relative_error

TASKS, RANK = 2, 3


def block(name: str) -> nn.Module:
    return make_blocks(name, 1, 0.0, dtype=torch.float32, width=64)[0]


def lora(pretrained: nn.Module, ratio: float, seed: int, without: tuple[str, ...] = ()):
    """A fine-tuned layer pretrained + left right in every matrix, and the factors."""
    generator = torch.Generator().manual_seed(seed)
    layer, factors = copy.deepcopy(pretrained), {}
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if p.dim() != 2:
                continue
            rank = 0 if name in without else RANK + seed % 2
            left = torch.randn(p.shape[0], rank, generator=generator)
            right = torch.randn(rank, p.shape[1], generator=generator)
            if rank:
                left *= ratio * p.norm() / (left @ right).norm()
            factors[name] = left.to(p.dtype), right.to(p.dtype)
            p += (left @ right).to(p.dtype)
    return layer, factors


def attached(layer: nn.Module, factors) -> nn.Module:
    layer = copy.deepcopy(layer)
    attach_factors(layer, factors)
    return layer


def linears(problem) -> list[Linear]:
    return [leaf for leaf in problem._root.leaves() if type(leaf) is Linear]


CASES = ["llama-mlp", "llama", "gpt2", "roberta", "vit"]
"""Packed gate and up, rotary attention, transposed matrices, biases, a norm folded in front."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ratio", [1e-1, 1e-3])
def test_against_float64_no_worse_than_dense(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    pretrained = block(name)
    tuned = [lora(pretrained, ratio, seed) for seed in range(TASKS)]
    shape = (7, 64) if name.endswith("mlp") else (3, 5, 64)
    anchors = torch.randn(TASKS, *shape)
    plain = layers.bind(pretrained, [layer for layer, _ in tuned], shape=shape, engine="program")
    thin = layers.bind(
        pretrained, [attached(*pair) for pair in tuned], shape=shape, engine="program"
    )
    assert all(linear._A is not None and linear._T is None for linear in linears(thin))
    assert all(linear._W_f is None for linear in linears(thin))
    assert all(linear._A is None for linear in linears(plain))
    # The oracle's fine-tuned weights are the exact sum.
    wide = in_float64(pretrained)
    exact = []
    for _, factors in tuned:
        layer = copy.deepcopy(wide)
        with torch.no_grad():
            for parameter, (left, right) in factors.items():
                layer.get_parameter(parameter).add_(left.double() @ right.double())
        exact.append(layer)
    gold = layers.bind(wide, exact, shape=shape, engine="autograd").evaluate(anchors.double())
    ours, dense = thin.evaluate(anchors), plain.evaluate(anchors)
    error, baseline = (relative_error(found.grad, gold.grad) for found in (ours, dense))
    assert error <= 1.2 * baseline, (error, baseline)
    assert torch.allclose(ours.loss.double(), gold.loss, rtol=1e-5)
    assert torch.allclose(ours.cosines.double(), gold.cosines, atol=1e-5)


def test_unchanged_matrices_have_rank_zero() -> None:
    pretrained = block("llama-mlp")
    tuned = [
        lora(pretrained, 0.01, seed, without=("up_proj.weight", "down_proj.weight"))
        for seed in range(TASKS)
    ]
    anchors = torch.randn(TASKS, 7, 64)
    found = [
        layers.bind(pretrained, experts, shape=(7, 64), engine="program").evaluate(anchors)
        for experts in ([layer for layer, _ in tuned], [attached(*pair) for pair in tuned])
    ]
    assert torch.allclose(found[0].loss, found[1].loss, rtol=1e-5)
    assert relative_error(found[1].grad, found[0].grad) < 1e-4
    assert found[1].cosines[:, 1:].eq(0).all()


def test_where_they_do_not_pay_the_product_is_formed() -> None:
    pretrained = block("llama-mlp")
    pairs = [lora(pretrained, 0.01, seed) for seed in range(TASKS)]
    experts = [attached(*pair) for pair in pairs]
    rounded = layers.bind(pretrained, experts, shape=(7, 64), precision="bf16", engine="program")
    mixed = layers.bind(pretrained, [experts[0], pairs[1][0]], shape=(7, 64), engine="program")
    for problem in (rounded, mixed):
        assert all(linear._A is None and linear._T is not None for linear in linears(problem))
    large = copy.deepcopy(pairs[0][0])
    full = {
        name: ((p - pretrained.get_parameter(name)).detach(), torch.eye(p.shape[1]))
        for name, p in large.named_parameters()
    }
    attach_factors(large, full)
    problem = layers.bind(pretrained, [large], shape=(7, 64), engine="program")
    assert all(linear._A is None for linear in linears(problem))


def test_wrong_factors_are_found_out(caplog: pytest.LogCaptureFixture) -> None:
    pretrained = block("llama-mlp")
    layer, factors = lora(pretrained, 0.1, 0)
    wrong = {name: (2 * left, right) for name, (left, right) in factors.items()}
    with pytest.raises(InputError, match="output of fine-tuned layer 0 differs"):
        layers.bind(pretrained, [attached(layer, wrong)], shape=(7, 64), engine="program")
    with caplog.at_level(logging.WARNING, "fda_fast"):
        layers.bind(pretrained, [attached(layer, wrong)], shape=(7, 64))
    assert "autograd engine" in caplog.text
    with pytest.raises(InputError, match="factors of parameter gate"):
        attach_factors(layer, {"gate": factors["gate_proj.weight"]})
    with pytest.raises(InputError, match="factors of parameter down_proj"):
        attach_factors(layer, {"down_proj.weight": factors["gate_proj.weight"]})
    assert factors_of(layer, "gate_proj.weight") is None
