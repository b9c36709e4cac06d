"""construct() and alignment() against the published loop written out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fda_fast.construct import alignment, construct
from fda_fast.errors import InputError


class TwoLayers(nn.Module):
    """A small block with every kind of parameter: norm, biases, weights, a residual."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    pretrained = TwoLayers().double()
    finetuned = []
    for scale in (0.03, 0.01):
        layer = copy.deepcopy(pretrained)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(scale * torch.randn_like(p))
        finetuned.append(layer)
    anchors = 0.5 * torch.randn(2, 7, 3, 12, dtype=torch.float64)
    return pretrained, finetuned, anchors


def published_loss(pretrained, finetuned, x):
    """The loss exactly as the method states it: similarity, one cosine per tensor, summed."""
    parameters = list(pretrained.parameters())
    s = F.cosine_similarity(pretrained(x).flatten(1), finetuned(x).flatten(1), dim=1).mean()
    grads = torch.autograd.grad(s, parameters, create_graph=True)
    cosines = [
        F.cosine_similarity(g.flatten(), (f - p).detach().flatten(), dim=0)
        for g, f, p in zip(grads, finetuned.parameters(), parameters, strict=True)
    ]
    return sum(1 - c for c in cosines), cosines


def published_loop(pretrained, finetuned, x0, steps):
    x = x0.clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=1e-2)
    history, best, best_x = [], math.inf, None
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = published_loss(pretrained, finetuned, x)
        (x.grad,) = torch.autograd.grad(loss, x)
        history.append(loss.item())
        if loss.item() < best:
            best, best_x = loss.item(), x.detach().clone()
        optimizer.step()
    return torch.tensor(history, dtype=x0.dtype), best_x


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_alignment_is_the_published_loss(pair, engine):
    pretrained, finetuned, anchors = pair
    x = anchors[0].clone().requires_grad_()
    loss, cosines = published_loss(pretrained, finetuned[0], x)
    (grad,) = torch.autograd.grad(loss, x)

    got = alignment(pretrained, finetuned[0], anchors[0], engine=engine)

    assert got.loss == pytest.approx(loss.item(), rel=1e-10)
    assert list(got.cosines) == [name for name, _ in pretrained.named_parameters()]
    for value, cosine in zip(got.cosines.values(), cosines, strict=True):
        assert value == pytest.approx(cosine.item(), abs=1e-10)
    torch.testing.assert_close(got.grad, grad, rtol=0, atol=1e-10 * grad.abs().max().item())


def test_twenty_steps_are_the_published_loop(pair):
    pretrained, finetuned, anchors = pair
    got = construct(pretrained, finetuned, anchors, steps=20, progress=False)
    for k, layer in enumerate(finetuned):
        history, best = published_loop(pretrained, layer, anchors[k], 20)
        torch.testing.assert_close(got.history[:, k], history, rtol=1e-8, atol=0)
        torch.testing.assert_close(got.anchors[k], best, rtol=0, atol=1e-7)
        assert got.loss[k] == history.min().item() or got.loss[k] == pytest.approx(
            history.min().item(), rel=1e-8
        )


def test_in_parts_the_same_steps(pair):
    pretrained, finetuned, anchors = pair
    whole = construct(pretrained, finetuned, anchors, steps=10, progress=False)
    split = construct(pretrained, finetuned, anchors, steps=10, part=3, progress=False)
    torch.testing.assert_close(split.history, whole.history, rtol=1e-10, atol=0)
    torch.testing.assert_close(split.anchors, whole.anchors, rtol=0, atol=1e-8)


def test_one_layer_and_a_list_of_one_agree(pair):
    pretrained, finetuned, anchors = pair
    one = construct(pretrained, finetuned[1], anchors[1], steps=3, progress=False)
    many = construct(pretrained, finetuned[1:], anchors[1:], steps=3, progress=False)
    assert one.anchors.shape == anchors[1].shape and many.anchors.shape == anchors[1:].shape
    assert torch.equal(one.anchors, many.anchors[0])
    assert one.loss == many.loss[0] and one.cosines == many.cosines[0]
    assert torch.equal(one.history, many.history[:, 0])


def test_best_anchors_are_the_evaluated_ones_not_the_last(pair):
    """With a learning rate that overshoots, the best X is an early one, before its update."""
    pretrained, finetuned, anchors = pair
    got = construct(pretrained, finetuned[0], anchors[0], steps=20, lr=100.0, progress=False)
    best = int(got.history.argmin())
    assert best < 19, "the learning rate was meant to overshoot"
    again = alignment(pretrained, finetuned[0], got.anchors)
    assert again.loss == pytest.approx(got.history[best].item(), rel=1e-9)
    assert got.loss == pytest.approx(again.loss, rel=1e-9)
    assert got.cosines == pytest.approx(again.cosines, abs=1e-9)


def test_the_input_anchors_are_left_alone(pair):
    pretrained, finetuned, anchors = pair
    before = anchors.clone()
    construct(pretrained, finetuned, anchors, steps=2, progress=False)
    assert torch.equal(anchors, before)


def test_patience_stops_on_a_plateau_and_only_then(pair):
    pretrained, finetuned, anchors = pair
    still = construct(
        pretrained, finetuned[0], anchors[0], steps=50, lr=0.0, patience=5, progress=False
    )
    assert len(still.history) == 10  # one window to compare, one that did not improve
    moving = construct(pretrained, finetuned[0], anchors[0], steps=15, patience=5, progress=False)
    assert len(moving.history) == 15


def test_callback_sees_every_evaluation(pair):
    pretrained, finetuned, anchors = pair
    seen = []
    got = construct(
        pretrained,
        finetuned,
        anchors,
        steps=4,
        on_step=lambda step, loss, cosines: seen.append((step, loss.clone(), cosines.shape)),
    )
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(torch.stack([loss for _, loss, _ in seen]), got.history)
    assert seen[0][2] == (2, len(list(pretrained.parameters())))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"patience": 0}, "patience"),
        ({"anchors": torch.zeros(12)}, "anchors"),
        ({"distance": "cosin"}, "distance"),
        ({"engine": "magic"}, "engine"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_bad_options_are_named(pair, change, named):
    pretrained, finetuned, anchors = pair
    options = {"anchors": anchors[0], "steps": 1, "progress": False, **change}
    with pytest.raises(InputError, match=named):
        construct(pretrained, finetuned[0], **options)


def test_a_nan_weight_is_said(pair):
    pretrained, finetuned, anchors = pair
    with torch.no_grad():
        finetuned[1].up.weight[0, 0] = math.nan
    with pytest.raises((RuntimeError, InputError), match=r"task 1|NaN"):
        construct(pretrained, finetuned, anchors, steps=2, engine="autograd", progress=False)
