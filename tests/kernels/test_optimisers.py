"""AdamW with best snapshot and loss ring, and the coefficients' update, over three steps."""

import pytest
import torch

from fda_fast.kernels import adamw, coefficients
from fda_fast.ops.reference import adamw as adamw_twin
from fda_fast.ops.reference import coefficients as coefficients_twin
from fda_fast.testing import GuardedView, assert_no_worse_than_torch

BETAS = (0.9, 0.999)


@pytest.fixture
def normal(generator):
    return lambda *shape: torch.randn(shape, generator=generator)


def compare(run, kernel, twin):
    out, guards = run(kernel, torch.float32)
    gold, _ = run(twin, torch.float64)
    baseline, _ = run(twin, torch.float32)
    for guard in guards:
        guard.check()
    for name in gold:
        assert_no_worse_than_torch(out[name], gold[name], baseline[name], name=name)


def views(tensors, dtype):
    guards = {name: GuardedView(tensor.to(dtype)) for name, tensor in tensors.items()}
    return {name: guard.tensor for name, guard in guards.items()}, list(guards.values())


@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (2, 3, 171), (3, 512), (1, 1025)])
@pytest.mark.parametrize("on_device", [False, True], ids=["host step", "device step"])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_adamw(shape, on_device, scale, normal):
    tasks = shape[0]
    start = {"x": normal(*shape), "m": torch.zeros(shape), "v": torch.zeros(shape)}
    start |= {"best": torch.zeros(shape), "best_loss": torch.full((tasks,), torch.inf)}
    start |= {"history": torch.zeros(2, tasks)}
    grads, losses = [normal(*shape) * scale for _ in range(3)], [normal(tasks) for _ in range(3)]
    losses[1][0] = torch.nan

    def run(module, dtype):
        s, guards = views(start, dtype)
        for count, (g, loss) in enumerate(zip(grads, losses, strict=True), 1):
            step = torch.tensor(count) if on_device else count
            module.step_(
                s["x"], g.to(dtype), s["m"], s["v"], step, loss.to(dtype), s["best_loss"],
                s["best"], 1e-2, BETAS, 1e-8, 0.01, s["history"],
            )  # fmt: skip
        s["history"] = torch.nan_to_num(s["history"], nan=-1.0)
        return s, guards

    compare(run, adamw, adamw_twin)


@pytest.mark.parametrize("shape", [(1, 1), (2, 0), (3, 171), (2, 512), (2, 7, 147)])
@pytest.mark.parametrize("on_device", [False, True], ids=["host step", "device step"])
def test_coefficients(shape, on_device, normal):
    start = {"alpha": normal(*shape), "delta": torch.full(shape[1:], torch.nan)}
    start |= {"m": torch.zeros(shape[1:]), "v": torch.zeros(shape[1:])}
    tau, grads = normal(*shape), [normal(*shape[1:]) for _ in range(3)]

    def run(module, dtype):
        s, guards = views(start, dtype)
        for count, g in enumerate(grads, 1):
            step = torch.tensor(count) if on_device else count
            module.update_(
                s["alpha"], tau.to(dtype), g.to(dtype), s["m"], s["v"], s["delta"], step, 1e-2,
                BETAS, 1e-8,
            )  # fmt: skip
        return s, guards

    compare(run, coefficients, coefficients_twin)


def test_a_beta_of_zero(normal):
    x, g = normal(1, 5), normal(1, 5)
    for step in (1, torch.tensor(1)):
        y, m, v, best = x.clone(), torch.zeros(1, 5), torch.zeros(1, 5), x.clone()
        loss = torch.zeros(1)
        adamw.step_(y, g, m, v, step, loss, loss.clone(), best, 0.1, (0.0, 0.0), 1e-8, 0.0)
        torch.testing.assert_close(y, x - 0.1 * g.sign(), rtol=0, atol=1e-6)
