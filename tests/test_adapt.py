"""adapt() against the published adaptation written out with torch.optim and autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fda_fast.adapt import adapt
from fda_fast.errors import InputError


class Block(nn.Module):
    def __init__(self, width: int = 10, hidden: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


DISTANCES = {
    "cosine": lambda y, t: -F.cosine_similarity(y, t, dim=1).sum(),
    "l2": lambda y, t: F.mse_loss(y, t, reduction="sum"),
    "l1": lambda y, t: F.l1_loss(y, t, reduction="sum"),
}


@pytest.fixture
def case():
    torch.manual_seed(1)
    pretrained = Block().double()
    finetuned = []
    for _ in range(3):
        layer = copy.deepcopy(pretrained)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.05 * torch.randn_like(p))
        finetuned.append(layer)
    anchors = torch.randn(3, 6, 4, 10, dtype=torch.float64)
    return pretrained, finetuned, list(zip(anchors, finetuned, strict=True))


def batches(size, batch_size, epochs, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(size, generator=generator).split(batch_size)


def data(tasks):
    x = torch.cat([anchors for anchors, _ in tasks])
    with torch.no_grad():
        y = torch.cat([layer(anchors) for anchors, layer in tasks])
    return x, y


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_weights_from_pretrained(case, distance, engine):
    pretrained, _, tasks = case
    expected = copy.deepcopy(pretrained)
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    x, y = data(tasks)
    for index in batches(18, 5, 4, seed=7):
        optimizer.zero_grad()
        DISTANCES[distance](expected(x[index]).flatten(1), y[index].flatten(1)).backward()
        optimizer.step()

    got = adapt(
        pretrained, tasks, epochs=4, lr=1e-3, batch_size=5, distance=distance, seed=7, engine=engine
    )
    for (name, a), b in zip(got.layer.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-9, msg=name)


def published_coefficients(pretrained, start, tasks, distance, epochs, lr, batch_size, seed):
    base = {n: p.detach() for n, p in pretrained.named_parameters()}
    vectors = [{n: p.detach() - base[n] for n, p in layer.named_parameters()} for layer, _ in start]
    alphas = [
        {n: torch.full_like(v, scale).requires_grad_() for n, v in vector.items()}
        for vector, (_, scale) in zip(vectors, start, strict=True)
    ]
    optimizer = torch.optim.Adam([a for d in alphas for a in d.values()], lr=lr)
    x, y = data(tasks)

    def merged():
        return {
            n: base[n] + sum(a[n] * v[n] for a, v in zip(alphas, vectors, strict=True))
            for n in base
        }

    for index in batches(len(x), batch_size, epochs, seed):
        optimizer.zero_grad()
        out = torch.func.functional_call(pretrained, merged(), (x[index],))
        DISTANCES[distance](out.flatten(1), y[index].flatten(1)).backward()
        optimizer.step()
    return {n: w.detach() for n, w in merged().items()}


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_coefficients_from_task_arithmetic(case, engine):
    pretrained, finetuned, tasks = case
    start = [(layer, 0.3) for layer in finetuned]
    expected = published_coefficients(pretrained, start, tasks, "l2", 3, 1e-2, 7, seed=3)
    got = adapt(
        pretrained,
        tasks,
        mode="coefficients",
        epochs=3,
        batch_size=7,
        distance="l2",
        seed=3,
        engine=engine,
    )
    for name, tensor in got.layer.named_parameters():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=0, atol=1e-9, msg=name)


def test_coefficients_from_one_merged_layer(case):
    """A tensor the starting point left pretrained has no coefficients and stays so."""
    pretrained, finetuned, tasks = case
    merged = {n: p.detach().clone() for n, p in finetuned[0].named_parameters()}
    base = dict(pretrained.named_parameters())
    merged["norm.weight"] = base["norm.weight"].detach().clone()
    got = adapt(pretrained, tasks, mode="coefficients", start=[(merged, 1.0)], epochs=2)
    adapted = dict(got.layer.named_parameters())
    assert torch.equal(adapted["norm.weight"], base["norm.weight"])
    assert not torch.equal(adapted["up.weight"], merged["up.weight"])


def test_history_falls_and_the_pretrained_layer_is_left_alone(case):
    pretrained, _, tasks = case
    before = copy.deepcopy(pretrained.state_dict())
    seen = []
    got = adapt(
        pretrained,
        tasks,
        epochs=20,
        lr=1e-3,
        distance="l2",
        on_epoch=lambda epoch, loss: seen.append((epoch, loss.item())),
    )
    assert len(got.history) == 20 and got.history[-1] < got.history[0]
    assert seen == [(e + 1, v) for e, v in enumerate(got.history.tolist())]
    for name, tensor in pretrained.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_weights_can_start_from_a_merged_layer(case):
    pretrained, finetuned, tasks = case
    got = adapt(pretrained, tasks, start=finetuned[0], epochs=1, lr=0.0)
    for a, b in zip(got.layer.parameters(), finetuned[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mode": "alphas"}, "mode"),
        ({"distance": "cos"}, "distance"),
        ({"epochs": 0}, "epochs"),
        ({"start": [(None, 1.0)]}, "start"),
        ({"mode": "coefficients", "start": {"up.weight": torch.zeros(1)}}, "start"),
    ],
)
def test_bad_options_are_named(case, change, named):
    pretrained, _, tasks = case
    with pytest.raises(InputError, match=named):
        adapt(pretrained, tasks, **change)
    with pytest.raises(InputError, match="tasks"):
        adapt(pretrained, [])


def test_divergence_is_said(case):
    pretrained, _, tasks = case
    with pytest.raises(RuntimeError, match="lower lr"):
        adapt(pretrained, tasks, epochs=3, lr=1e300, distance="l2")
