"""Visible to torch.compile as single ops; not there at all in eager calls."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fda_fast.ops import activation, adamw, gated, norm, similarity
from fda_fast.ops.library import TRACED


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def sweeps(x, dx, g, t, weight, tw):
    """Something of every operation, with absent arguments and outputs."""
    y, dy = norm.forward("layer", x, dx, weight, None, tw, None, 1e-5)
    g_x, g_w, g_c = norm.backward("layer", x, g, weight, 1e-5, True, True, False)
    t_y = norm.tangent("layer", x, t, weight, tw, None, 1e-5)
    assert g_c is None and norm.tangent("rms", x, None, weight, None, None, 1e-5) is None
    a, da = activation.forward("gelu", y, dy)
    only, none = activation.forward("silu", y, None)
    assert none is None
    S, b = activation.reverse("gelu", y, dy, g_x, t_y, g, g, True)
    h, dh = gated.forward("silu", a, da)
    s, g_h = similarity.forward("cosine", h, dh, 2.0)
    return y, dy, g_x, g_w, t_y, a, da, only, S, b, h, dh, s, g_h


def test_one_graph_and_the_same_numbers(draw):
    torch._dynamo.reset()
    x, dx, g, t = (draw(2, 3, 8) for _ in range(4))
    arguments = (x, 0.01 * dx, g, t, draw(8), draw(2, 8))
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(sweeps, fullgraph=True, backend=backend)(*arguments)
    for one, expected in zip(compiled, sweeps(*arguments), strict=True):
        assert torch.equal(one, expected)
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    for name in ("norm_forward", "activation_reverse", "gated_forward", "similarity_forward"):
        assert any(f"fda_fast.{name}" in target for target in called), called


def test_adamw_in_a_compiled_function(draw):
    torch._dynamo.reset()

    def run(step):
        torch.manual_seed(0)
        x, g = torch.randn(2, 5), torch.randn(2, 5)
        m, v, best = torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)
        best_loss, history = torch.full((2,), torch.inf), torch.zeros(3, 2)
        step(x, g, m, v, best, best_loss, history)
        return x, m, v, best, best_loss, history

    def step(x, g, m, v, best, best_loss, history):
        loss = x.square().sum(1)
        adamw.step_(x, g * 2, m, v, torch.tensor(1), loss, best_loss, best, 1e-2, history=history)

    compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for one, expected in zip(compiled, run(step), strict=True):
        assert torch.equal(one, expected)


def test_opcheck(draw):
    x, dx, g = draw(1, 3, 6), draw(1, 3, 6), draw(1, 3, 6)
    checks = ("test_schema", "test_faketensor")
    cases = {
        "activation_forward": ("gelu", x, dx),
        "activation_reverse": ("silu", x, dx, g, g, g, g, True),
        "gated_backward": ("silu", x, draw(1, 3, 3)),
        "norm_adjoint": ("rms", x, None, g, draw(6), None, 1e-5, True, True, False),
        "similarity_reverse": ("cosine", x, dx, g, 1.0),
    }
    for name, arguments in cases.items():
        torch.library.opcheck(getattr(torch.ops.fda_fast, name), arguments, test_utils=checks)


def test_eager_calls_bypass_the_ops(draw):
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    assert set(TRACED) == {"activation", "gated", "norm", "similarity", "adamw"}
    x = draw(1, 2, 8)
    with Spy():
        activation.forward("gelu", x, x, backend="torch")
    assert seen and not any("fda_fast" in name for name in seen)
