"""Gradient matching: any direction, any objective, on programs and on autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from blocks import BLOCKS, WIDTH, in_float64, make_anchors, make_blocks
from torch import nn

import fda_fast
from fda_fast.errors import InputError
from fda_fast.layers.autograd import zero_gradient_names
from fda_fast.layers.call import call_layer
from fda_fast.testing import assert_no_worse_than_torch

CLASSES = 5


def cross_entropy(dtype=torch.float64):
    """What condensation and inversion minimise: a head on the mean token, and labels."""
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(WIDTH, CLASSES, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.arange(4) % CLASSES
    return lambda y: F.cross_entropy(y.mean(1) @ head, labels[: len(y)])


def squared_error(y):
    return (y.square().sum(-1) - 1).square().mean()


def direction_of(layer, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in layer.named_parameters()
    }


def by_hand(layer, direction, anchors, objective):
    """Loss and gradient by a double backward written out here; terms of no gradient are 1."""
    x = anchors.clone().requires_grad_()
    parameters = dict(layer.named_parameters())
    constant = zero_gradient_names(layer)
    names = [name for name in direction if name not in constant]
    gradients = torch.autograd.grad(
        objective(call_layer(layer, x)), [parameters[n] for n in names], create_graph=True
    )
    cosines = [
        F.cosine_similarity(g.flatten(), direction[n].flatten(), dim=0)
        for n, g in zip(names, gradients, strict=True)
    ]
    loss = len(direction) - sum(cosines)
    return loss.item(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_programs_compute_it_exactly(name: str) -> None:
    layer, _ = make_blocks(name, 1, 0.1)
    direction, anchors = direction_of(layer), make_anchors(1, 4, 6)[0]
    for objective in (cross_entropy(), squared_error):
        found = fda_fast.gradient_alignment(layer, direction, anchors, objective, engine="program")
        loss, grad = by_hand(layer, direction, anchors, objective)
        assert abs(found.loss - loss) < 1e-10
        assert (found.grad - grad).norm() < 1e-9 * grad.norm()


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2"])
def test_in_float32_no_worse_than_torch(name: str) -> None:
    layer, _ = make_blocks(name, 1, 0.1, torch.float32)
    direction, anchors = direction_of(layer), make_anchors(1, 4, 6, torch.float32)[0]
    found = fda_fast.gradient_alignment(
        layer, direction, anchors, cross_entropy(torch.float32), engine="program"
    )
    wide = {n: d.double() for n, d in direction.items()}
    _, gold = by_hand(in_float64(layer), wide, anchors.double(), cross_entropy())
    _, baseline = by_hand(layer, direction, anchors, cross_entropy(torch.float32))
    assert_no_worse_than_torch(found.grad, gold, baseline)


def test_engines_agree_and_only_the_direction_counts() -> None:
    layer, _ = make_blocks("bert", 1, 0.1)
    whole, anchors = direction_of(layer), make_anchors(1, 4, 6)[0]
    names = [n for n in whole if "dense" in n]
    part = {n: whole[n] * 10.0**k for k, n in enumerate(names, -2)}
    found = [
        fda_fast.gradient_alignment(layer, part, anchors, squared_error, engine=engine)
        for engine in ("program", "autograd")
    ]
    loss, grad = by_hand(layer, part, anchors, squared_error)
    for one in found:
        assert list(one.cosines) == names
        assert abs(one.loss - loss) < 1e-10
        assert (one.grad - grad).norm() < 1e-9 * grad.norm()


def test_any_module_runs_on_autograd(caplog) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 9), nn.Softplus(), nn.Linear(9, 3)).double()
    direction = {"0.weight": torch.randn(9, 6), "2.bias": torch.randn(3)}
    anchors = torch.randn(7, 6, dtype=torch.float64)
    found = fda_fast.gradient_alignment(layer, direction, anchors, squared_error)
    loss, grad = by_hand(
        layer, {n: d.double() for n, d in direction.items()}, anchors, squared_error
    )
    assert abs(found.loss - loss) < 1e-10 and torch.allclose(found.grad, grad, rtol=1e-9)
    assert "runs on the autograd engine" in caplog.text


def test_inputs_are_found_back_from_their_gradient() -> None:
    """Inversion: the gradient of two examples leads back to inputs with that gradient."""
    layer, _ = make_blocks("bert", 1, 0.1, torch.float32)
    objective, secret = cross_entropy(torch.float32), make_anchors(1, 2, 3, torch.float32)[0]
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(objective(call_layer(layer, secret)), list(parameters.values()))
    shared = dict(zip(parameters, gradients, strict=True))
    at_secret = fda_fast.gradient_alignment(layer, shared, secret, objective)
    dead = len(zero_gradient_names(layer))
    assert abs(at_secret.loss - dead) < 1e-4
    x = secret + 0.5 * torch.randn(secret.shape, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    problem = fda_fast.gradient_matching(layer, shared, objective, tuple(x.shape))
    optimiser = torch.optim.Adam([x], lr=0.02)
    losses = []
    for _ in range(60):
        found = problem.evaluate(x[None])
        x.grad = found.grad[0]
        optimiser.step()
        losses.append(found.loss.item() - dead)
    assert losses[-1] < 0.2 * losses[0]


def test_a_pair_of_layers_with_a_direction_of_its_own() -> None:
    layer, (tuned,) = make_blocks("bert", 1, 0.1)
    anchors = make_anchors(1, 4, 6)[0]
    vector = {
        n: t - p for (n, t), p in zip(tuned.named_parameters(), layer.parameters(), strict=True)
    }
    plain = fda_fast.alignment(layer, tuned, anchors, engine="autograd")
    same = fda_fast.alignment(layer, tuned, anchors, direction=vector)
    assert abs(plain.loss - same.loss) < 1e-12 and torch.allclose(plain.grad, same.grad)
    against = fda_fast.alignment(
        layer, tuned, anchors, direction={n: -v for n, v in vector.items()}
    )
    assert torch.allclose(against.grad, -plain.grad)
    some = {n: v for n, v in vector.items() if n.startswith("output")}
    part = fda_fast.alignment(layer, tuned, anchors, direction=some)
    assert abs(part.loss - sum(1 - plain.cosines[n] for n in some)) < 1e-12
    with pytest.raises(InputError, match="gradient_alignment"):
        fda_fast.alignment(layer, tuned, anchors, direction=vector, engine="program")


def test_refusals_and_inputs_left_alone() -> None:
    layer, _ = make_blocks("bert", 1, 0.1, torch.float32)
    before = copy.deepcopy(layer.state_dict())
    anchors = make_anchors(1, 4, 6, torch.float32)[0]
    whole = direction_of(layer)
    name = "output.dense.bias"
    for wrong, said in {
        "none": ({}, "at least one"),
        "unknown": ({"output.dens.bias": whole[name]}, "no parameter of BertLayer"),
        "shape": ({name: whole["output.dense.weight"]}, "expected"),
        "nan": ({name: whole[name] * torch.nan}, "finite"),
    }.values():
        with pytest.raises(InputError, match=said):
            fda_fast.gradient_alignment(layer, wrong, anchors, squared_error)
    for objective in (lambda y: y, lambda y: 3.0, lambda y: y.sum().detach()):
        for engine in ("program", "autograd"):
            with pytest.raises(InputError, match="objective"):
                fda_fast.gradient_alignment(layer, whole, anchors, objective, engine=engine)
    with pytest.raises(InputError, match="engine"):
        fda_fast.gradient_alignment(
            nn.Linear(WIDTH, 3), {"bias": torch.ones(3)}, anchors, squared_error, engine="program"
        )
    assert all(torch.equal(layer.state_dict()[n], t) for n, t in before.items())
    assert not any(p.grad is not None for p in layer.parameters())
