"""Coefficients on task vectors: autograd's gradient, torch.optim.Adam's trajectory."""

import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.ops import coefficients
from fda_fast.testing import GuardedView, assert_no_worse_than_torch


class State:
    def __init__(self, alpha, tau, backend):
        self.tau, self.backend = tau, backend
        zeros = torch.zeros_like(alpha[0])
        empty = torch.full_like(alpha[0], torch.nan)
        self.guards = [GuardedView(v) for v in (alpha, zeros, zeros, empty)]
        self.alpha, self.avg, self.avg_sq, self.delta = (g.tensor for g in self.guards)

    def step(self, grad, step, lr=1e-2):
        coefficients.update_(
            self.alpha, self.tau, grad, self.avg, self.avg_sq, self.delta, step, lr,
            backend=self.backend,
        )  # fmt: skip
        for guard in self.guards:
            guard.check()


def test_twin_is_autograd_and_torch_optim(generator):
    tau = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    start = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=1e-2)
    ours = State(start, tau, "torch")
    for step in range(1, 6):
        grad = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (grad * (theirs * tau).sum(0)).sum().backward()
        optimizer.step()
        ours.step(grad, step)
        torch.testing.assert_close(ours.alpha, theirs.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(ours.delta, (theirs * tau).sum(0).detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 31, 33), (2, 0), (4, 9001)])
@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
def test_trajectory(backend, device, shape, scale, generator):
    alpha = torch.rand(shape, generator=generator)
    tau = torch.randn(shape, generator=generator) * scale
    grads = [torch.randn(shape[1:], generator=generator) for _ in range(3)]

    def run(backend, dtype, device):
        state = State(alpha.to(device, dtype), tau.to(device, dtype), backend)
        for step, grad in enumerate(grads, 1):
            state.step(grad.to(device, dtype), step)
        return state

    out = run(backend, torch.float32, device)
    gold = run("torch", torch.float64, "cpu")
    baseline = run("torch", torch.float32, "cpu")
    for name in ("alpha", "avg", "avg_sq", "delta"):
        assert_no_worse_than_torch(
            getattr(out, name), getattr(gold, name), getattr(baseline, name), name=name
        )


def test_bad_shapes_are_named():
    alpha = torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"grad: expected \[3\] torch.float32"):
        coefficients.update_(alpha, alpha, torch.zeros(4), alpha, alpha, torch.zeros(4), 1, 0.1)
    with pytest.raises(InputError, match=r"tau: expected the shape of alpha"):
        coefficients.update_(alpha, alpha[:1], alpha[0], alpha, alpha, alpha[0], 1, 0.1)
