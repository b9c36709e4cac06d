"""The autograd engine against the published loop, written out independently."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fda_fast.errors import InputError
from fda_fast.layers.autograd import AutogradAdaptation, AutogradProblem


class TwoLayers(nn.Module):
    def __init__(self, width=6, hidden=9):
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.second = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.second(F.gelu(self.norm(self.first(x))))


class TinyGradient(nn.Module):
    """A layer whose gradients are far below cosine_similarity's floor of 1e-8."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return x + 1e-10 * self.linear(x).tanh()


def perturbed(layer, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for p in other.parameters():
            noise = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            p += ratio * p.norm() * noise / noise.norm() if p.any() else ratio * noise
    return other


def published(pretrained, finetuned, x, distance):
    """Loss, dL/dX and cosines by plain double backward over everything, as the paper's code."""
    pretrained, finetuned = copy.deepcopy(pretrained), copy.deepcopy(finetuned)
    x = x.clone().requires_grad_()
    y, y_f = pretrained(x).flatten(1), finetuned(x).flatten(1)
    if distance == "cosine":
        s = F.cosine_similarity(y, y_f, dim=1).mean()
    elif distance == "l2":
        s = -F.mse_loss(y, y_f)
    else:
        s = -F.l1_loss(y, y_f)
    gradients = torch.autograd.grad(s, list(pretrained.parameters()), create_graph=True)
    cosines = [
        F.cosine_similarity(g.flatten(), (b - a).flatten(), dim=0)
        for g, a, b in zip(gradients, pretrained.parameters(), finetuned.parameters(), strict=True)
    ]
    loss = sum(1 - c for c in cosines)
    loss.backward()
    return loss.detach(), x.grad, torch.stack(cosines).detach()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def layers():
    torch.manual_seed(0)
    pretrained = TwoLayers().double()
    return pretrained, [perturbed(pretrained, 0.05, seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize("shape", [(7, 6), (5, 3, 6)])
def test_equals_published_loop(layers, distance, shape):
    pretrained, finetuned = layers
    anchors = torch.randn(3, *shape, dtype=torch.float64)
    got = AutogradProblem(pretrained, finetuned, distance=distance).evaluate(anchors)
    for k in range(3):
        loss, grad, cosines = published(pretrained, finetuned[k], anchors[k], distance)
        assert abs(got.loss[k] - loss) < 1e-10
        assert relative(got.grad[k], grad) < 1e-10
        assert (got.cosines[k] - cosines).abs().max() < 1e-10


def test_first_twenty_adamw_steps(layers):
    pretrained, finetuned = layers
    start = torch.randn(3, 5, 3, 6, dtype=torch.float64)
    problem = AutogradProblem(pretrained, finetuned, distance="cosine")
    ours = start.clone().requires_grad_()
    optimiser = torch.optim.AdamW([ours], lr=1e-2)
    curve = []
    for _ in range(20):
        evaluation = problem.evaluate(ours)
        ours.grad = evaluation.grad
        optimiser.step()
        curve.append(evaluation.loss)
    for k in range(3):
        theirs = start[k].clone().requires_grad_()
        optimiser = torch.optim.AdamW([theirs], lr=1e-2)
        for step in range(20):
            loss, theirs.grad, _ = published(pretrained, finetuned[k], theirs.detach(), "cosine")
            optimiser.step()
            assert abs(curve[step][k] - loss) < 1e-10
        assert relative(ours[k].detach(), theirs.detach()) < 1e-10


def test_floor_of_the_gradient_norm():
    torch.manual_seed(0)
    pretrained = TinyGradient().double()
    finetuned = perturbed(pretrained, 0.05, 1)
    anchors = torch.randn(1, 4, 5, dtype=torch.float64)
    got = AutogradProblem(pretrained, [finetuned], distance="l2").evaluate(anchors)
    loss, grad, cosines = published(pretrained, finetuned, anchors[0], "l2")
    assert 0 < cosines.abs().max() < 1e-6  # the floor is at work
    assert relative(got.cosines[0], cosines) < 1e-10
    assert relative(got.grad[0], grad) < 1e-10
    assert abs(got.loss[0] - loss) < 1e-12


def test_constant_terms(layers):
    pretrained, finetuned = layers
    other = copy.deepcopy(finetuned[0])
    other.norm.weight.data = pretrained.norm.weight.data.clone()
    anchors = torch.randn(1, 5, 6, dtype=torch.float64)
    names = [name for name, _ in pretrained.named_parameters()]
    problem = AutogradProblem(pretrained, [other], distance="cosine", zero_gradient=["first.bias"])
    assert problem.parameter_names == names
    got = problem.evaluate(anchors)
    # The same with the two terms taken out of the published sum.
    loss, _, cosines = published(pretrained, other, anchors[0], "cosine")
    index = names.index("first.bias")
    assert got.cosines[0, index] == 0 and got.cosines[0, names.index("norm.weight")] == 0
    assert abs(got.loss[0] - (loss + cosines[index])) < 1e-10


def test_identical_task_gives_constant_loss_and_zero_gradient(layers):
    pretrained, _ = layers
    anchors = torch.randn(1, 5, 6, dtype=torch.float64)
    got = AutogradProblem(pretrained, [copy.deepcopy(pretrained)], distance="l1").evaluate(anchors)
    assert got.loss.item() == 6 and not got.grad.any() and not got.cosines.any()


def test_leaves_the_layers_alone(layers):
    pretrained, finetuned = layers
    pretrained.train()
    for p in finetuned[0].parameters():
        p.requires_grad_(False)
    before = {name: p.clone() for name, p in pretrained.named_parameters()}
    problem = AutogradProblem(pretrained, finetuned[:1], distance="cosine")
    problem.evaluate(torch.randn(1, 5, 6, dtype=torch.float64))
    assert pretrained.training and all(p.requires_grad for p in pretrained.parameters())
    assert not any(p.requires_grad for p in finetuned[0].parameters())
    for name, p in pretrained.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])


def test_low_precision_layers_are_computed_in_float32(layers):
    low = [layer.bfloat16() for layer in (copy.deepcopy(layers[0]), *copy.deepcopy(layers[1]))]
    wide = [copy.deepcopy(layer).float() for layer in low]
    anchors = torch.randn(3, 5, 3, 6)
    got = AutogradProblem(low[0], low[1:]).evaluate(anchors)
    want = AutogradProblem(wide[0], wide[1:]).evaluate(anchors)
    mixed = AutogradProblem(low[0], wide[1:]).evaluate(anchors)
    for one in (got, mixed):
        assert torch.equal(one.grad, want.grad) and one.grad.dtype == torch.float32
    assert low[0].first.weight.dtype == torch.bfloat16
    tasks, wide_tasks = ([(anchors[0], layer)] for layer in (low[1], wide[1]))
    index = torch.arange(5)
    problem = AutogradAdaptation(low[0], tasks)
    assert problem.deltas["first.weight"].dtype == torch.float32
    other = AutogradAdaptation(wide[0], wide_tasks)
    assert torch.equal(problem.evaluate(index), other.evaluate(index))


def test_refuses_what_does_not_fit(layers):
    pretrained, finetuned = layers
    with pytest.raises(InputError, match=r"cosine \| l2 \| l1"):
        AutogradProblem(pretrained, finetuned, distance="l3")
    with pytest.raises(InputError, match="at least one"):
        AutogradProblem(pretrained, [])
    with pytest.raises(InputError, match=r"first\.weight"):
        AutogradProblem(pretrained, [TwoLayers(hidden=8).double()])
    with pytest.raises(InputError, match=r"second\.bias"):
        other = copy.deepcopy(pretrained)
        other.second.bias = None
        AutogradProblem(pretrained, [other])
    problem = AutogradProblem(pretrained, finetuned)
    with pytest.raises(InputError, match="3 tasks"):
        problem.evaluate(torch.randn(2, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
def test_adaptation_equals_written_out_loss(layers, distance):
    pretrained, finetuned = layers
    sizes = (4, 6, 3)
    anchors = [torch.randn(n, 3, 6, dtype=torch.float64) for n in sizes]
    problem = AutogradAdaptation(
        pretrained, list(zip(anchors, finetuned, strict=True)), distance=distance
    )
    assert problem.size == 13
    model = copy.deepcopy(pretrained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            problem.deltas[name].copy_(0.1 * torch.randn_like(p))
            p += problem.deltas[name]
    index = torch.tensor([12, 0, 5, 3, 9])
    owner = torch.tensor([0] * 4 + [1] * 6 + [2] * 3)
    loss = 0
    for i in index:
        x = torch.cat(anchors)[i][None]
        y = model(x).flatten()
        target = finetuned[owner[i]](x).flatten().detach()
        if distance == "cosine":
            loss = loss - F.cosine_similarity(y, target, dim=0)
        elif distance == "l2":
            loss = loss + ((y - target) ** 2).sum()
        else:
            loss = loss + (y - target).abs().sum()
    loss.backward()
    assert abs(problem.evaluate(index) - loss) < 1e-10
    for name, p in model.named_parameters():
        assert relative(problem.gradients[name], p.grad) < 1e-10


def test_adaptation_refuses_mixed_lengths(layers):
    pretrained, finetuned = layers
    tasks = [(torch.randn(2, t, 6, dtype=torch.float64), finetuned[0]) for t in (3, 4)]
    with pytest.raises(InputError, match="anchors of task 1"):
        AutogradAdaptation(pretrained, tasks)
