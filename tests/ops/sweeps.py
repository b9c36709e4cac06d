"""Helpers of the sweeps' tests: inputs drawn once, run in three ways, compared by the gate."""

import torch

from fda_fast.testing import GuardedView, assert_no_worse_than_torch, poisoned_empty


def draw(generator, *shape, scale=1.0):
    return torch.randn(shape, generator=generator) * scale


def convert(value, dtype, device="cpu"):
    """A tensor on the device, and in the dtype if it holds real numbers; the rest as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def guarded(value):
    real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return GuardedView(value).tensor if real else value


def outputs(result):
    """A function's result as a tuple, whatever it returns."""
    return result if isinstance(result, tuple) else (result,)


def check(function, twin, arguments, backend, device, *, factor=2.0):
    """Hold ``function(*arguments)`` to the gate against ``twin`` (the torch reference).

    Inputs lie at unaligned addresses and must come back unchanged; outputs start as NaN.
    """
    gold = outputs(twin(*(convert(a, torch.float64) for a in arguments)))
    baseline = outputs(twin(*arguments))
    given = [guarded(convert(a, torch.float32, device)) for a in arguments]
    with poisoned_empty():
        out = outputs(function(*given, backend=backend))
    for before, after in zip(arguments, given, strict=True):
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after.cpu()), "an input was written"
    assert len(out) == len(gold)
    for i, (o, g, b) in enumerate(zip(out, gold, baseline, strict=True)):
        assert (o is None) == (g is None), f"output {i}"
        if o is not None:
            assert_no_worse_than_torch(o, g, b, factor=factor, name=f"output {i}")


def reverse_by_autograd(f, x, dx, g, t, S, b, f_finetuned=None):
    """S_x and b_x of an operation from their meaning, by autograd through the plain ``f``.

    S is the sum of the cotangents of both branches, b that of the fine-tuned one alone, and the
    second derivative comes from <g, J(x) t> = <J(x)^T g, t>.
    """
    f_finetuned = f_finetuned or f
    x = x.detach().requires_grad_()
    y = f(x)
    (g_x,) = torch.autograd.grad(y, x, g, create_graph=True)
    total = ((S - b) * y).sum() + (b * f_finetuned(x + dx)).sum() + (g_x * t).sum()
    (S_x,) = torch.autograd.grad(total, x)
    moved = (x + dx).detach().requires_grad_()
    (b_x,) = torch.autograd.grad(f_finetuned(moved), moved, b)
    return S_x, b_x
