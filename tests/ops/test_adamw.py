"""AdamW in one pass: torch.optim.AdamW's own trajectory, and the best anchors kept."""

import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.ops import adamw
from fda_fast.testing import GuardedView, assert_no_worse_than_torch

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


class State:
    def __init__(self, anchors, backend):
        self.backend = backend
        tasks = anchors.shape[0]
        views = [anchors, *[torch.zeros_like(anchors)] * 3]
        views += [torch.full((tasks,), torch.inf, dtype=anchors.dtype, device=anchors.device)]
        self.guards = [GuardedView(v) for v in views]
        self.anchors, self.avg, self.avg_sq, self.best, self.best_loss = (
            g.tensor for g in self.guards
        )

    def step(self, grad, step, loss, **settings):
        adamw.step_(
            self.anchors, grad, self.avg, self.avg_sq, step, loss, self.best_loss, self.best,
            backend=self.backend, **{**SETTINGS, **settings},
        )  # fmt: skip
        for guard in self.guards:
            guard.check()


def draw(shape, generator, scale=1.0):
    return torch.randn(shape, generator=generator) * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twin_is_torch_optim_bit_for_bit(dtype, generator):
    start = draw((3, 5, 7), generator).to(dtype)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], **SETTINGS, foreach=False)
    ours = State(start, "torch")
    for step in range(1, 6):
        grad = draw(start.shape, generator).to(dtype)
        theirs.grad = grad.clone()
        optimizer.step()
        ours.step(grad, step, torch.zeros(3, dtype=dtype))
    assert torch.equal(ours.anchors, theirs.detach())


@pytest.mark.parametrize("shape", [(1, 1), (2, 1, 3), (3, 16), (4, 3, 259), (2, 0, 5), (5, 9001)])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_trajectory(backend, device, shape, scale, generator):
    start = draw(shape, generator)
    grads = [draw(shape, generator, scale) for _ in range(4)]
    losses = [draw(shape[:1], generator) for _ in grads]

    def run(backend, dtype, device):
        state = State(start.to(device, dtype), backend)
        for step, (grad, loss) in enumerate(zip(grads, losses, strict=True), 1):
            state.step(grad.to(device, dtype), step, loss.to(device, dtype))
        return state

    out = run(backend, torch.float32, device)
    gold = run("torch", torch.float64, "cpu")
    baseline = run("torch", torch.float32, "cpu")
    for name in ("anchors", "avg", "avg_sq", "best", "best_loss"):
        assert_no_worse_than_torch(
            getattr(out, name), getattr(gold, name), getattr(baseline, name), name=name
        )


def test_best_is_of_the_anchors_before_their_update(backend, device, generator):
    state = State(draw((3, 4, 5), generator).to(device), backend)
    seen = []
    losses = torch.tensor(
        [[3.0, 1.0, torch.nan], [2.0, 2.0, 5.0], [2.0, 0.5, 6.0], [2.5, torch.nan, 5.0]]
    )
    for step, loss in enumerate(losses, 1):
        seen.append(state.anchors.clone())
        state.step(draw((3, 4, 5), generator).to(device), step, loss.to(device))
    # Equal losses keep the earlier anchors.
    assert torch.equal(state.best[0], seen[1][0])
    assert torch.equal(state.best[1], seen[2][1])
    assert torch.equal(state.best[2], seen[1][2])
    assert state.best_loss.tolist() == [2.0, 0.5, 5.0]


def test_step_held_in_a_tensor(backend, device, generator):
    start = draw((2, 6, 131), generator).to(device)
    by_int, by_tensor = State(start, backend), State(start, backend)
    loss = torch.zeros(2, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    for step in range(1, 5):
        grad = draw(start.shape, generator).to(device)
        count += 1
        by_int.step(grad, step, loss)
        by_tensor.step(grad, count, loss)
    torch.testing.assert_close(by_int.anchors, by_tensor.anchors, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("on_device", [False, True])
def test_history_is_a_ring(backend, device, on_device, generator):
    state = State(draw((2, 3), generator).to(device), backend)
    history = torch.full((3, 2), torch.nan, device=device)
    losses = draw((5, 2), generator).to(device)
    for step, loss in enumerate(losses, 1):
        count = torch.tensor(step, device=device) if on_device else step
        state.step(torch.ones(2, 3, device=device), count, loss, history=history)
    assert torch.equal(history, torch.stack([losses[3], losses[4], losses[2]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 4)}, r"grad: expected the shape of anchors, \[2, 3\]"),
        ({"exp_avg": torch.zeros(2, 3, dtype=torch.float64)}, "exp_avg: expected torch.float32"),
        ({"best_anchors": torch.zeros(3, 2).T}, "best_anchors: expected a contiguous tensor"),
        ({"loss": torch.zeros(3), "best_loss": torch.zeros(3)}, "one value for each of 2 tasks"),
        ({"history": torch.zeros(4, 3)}, r"history: expected \[capacity, 2\]"),
        ({"step": 0}, "step: expected the number of this update, from 1, got 0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        name: torch.zeros(2, 3)
        for name in ("anchors", "grad", "exp_avg", "exp_avg_sq", "best_anchors")
    }
    arguments |= {"loss": torch.zeros(2), "best_loss": torch.zeros(2), "step": 1} | change
    with pytest.raises(InputError, match=message):
        adamw.step_(**arguments, lr=0.1)
