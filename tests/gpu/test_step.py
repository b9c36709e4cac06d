"""Whole steps on the card: the engine's fidelity gate on real shapes, graphs, repeatability."""

import copy

import pytest
import torch

from fda_fast import layers
from fda_fast.layers.graph import AnchorOptimiser, step_runner

GATE = {"fp32": None, "tf32": 3e-3, "bf16": 2e-2}
RATIOS = (1e-1, 1e-2, 1e-3, 1e-4)


def swiglu(real):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    width = real(5120, 24)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=real(13824, 40), num_attention_heads=8
    )
    return LlamaMLP(config), (real(8192, 6), width)


def vit(real):
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    width = real(768, 24)
    config = CLIPVisionConfig(
        hidden_size=width, num_attention_heads=real(12, 2), intermediate_size=4 * width
    )
    config._attn_implementation = "sdpa"
    return CLIPEncoderLayer(config), (real(64, 2), real(50, 3), width)


def roberta(real):
    from transformers import RobertaConfig
    from transformers.models.roberta.modeling_roberta import RobertaLayer

    width = real(768, 24)
    config = RobertaConfig(
        hidden_size=width, num_attention_heads=real(12, 2), intermediate_size=4 * width
    )
    config._attn_implementation = "sdpa"
    return RobertaLayer(config), (real(64, 2), 5, width)


def make(build, ratio, tasks, device, real):
    torch.manual_seed(0)
    with torch.device(device):  # drawing 200 million numbers takes a processor seconds
        pretrained, shape = build(real)
    pretrained.eval()
    finetuned = [copy.deepcopy(pretrained) for _ in range(tasks)]
    with torch.no_grad():
        for layer in finetuned:
            for p in layer.parameters():
                step = torch.randn_like(p)
                p.add_(step * (ratio * p.norm() / step.norm()))
    return pretrained, finetuned, 0.05 * torch.randn(tasks, *shape, device=device)


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("build", [swiglu, vit, roberta])
@pytest.mark.parametrize("ratio", RATIOS)
def test_fidelity_gate(build, ratio, device, real):
    pretrained, finetuned, anchors = make(build, ratio, 1, device, real)
    wide = [copy.deepcopy(layer).double() for layer in (pretrained, *finetuned)]
    shape = tuple(anchors.shape[1:])
    gold = layers.bind(wide[0], wide[1:], shape=shape, engine="autograd").evaluate(anchors.double())
    del wide
    plain = layers.bind(pretrained, finetuned, shape=shape, engine="autograd").evaluate(anchors)
    for precision, gate in GATE.items():
        problem = layers.bind(
            pretrained, finetuned, shape=shape, engine="program", precision=precision
        )
        out = problem.evaluate(anchors)
        error = relative(out.grad, gold.grad)
        print(f"{build.__name__:8s} {ratio:.0e} {precision:5s} grad {error:.1e}"
              f" cosines {relative(out.cosines, gold.cosines):.1e}")  # fmt: skip
        assert error <= (relative(plain.grad, gold.grad) if gate is None else gate)


def optimise(problem, anchors, steps, runner):
    optimiser = AnchorOptimiser(problem, anchors, steps=steps, lr=1e-2)
    run = runner(optimiser.step)
    for _ in range(steps):
        run()
    return optimiser


@pytest.mark.parametrize("build", [swiglu, vit, roberta])
@pytest.mark.parametrize("precision", GATE)
def test_recorded_steps_equal_single_launches(build, precision, device, real):
    steps = real(10, 2)
    pretrained, finetuned, anchors = make(build, 1e-2, 2, device, real)
    problem = layers.bind(
        pretrained, finetuned, shape=tuple(anchors.shape[1:]), engine="program", precision=precision
    )
    eager = optimise(problem, anchors, steps, lambda step: step)
    recorded = optimise(problem, anchors, steps, lambda step: step_runner(step, device))
    assert torch.equal(eager.history, recorded.history)
    assert torch.equal(eager.best_anchors, recorded.best_anchors)
    again = optimise(problem, anchors, steps, lambda step: step_runner(step, device))
    assert torch.equal(again.history, recorded.history)


@pytest.mark.card
def test_steps_are_recorded_and_several_graphs_live(device, real):
    runs = []
    for build in (roberta, vit):
        pretrained, finetuned, anchors = make(build, 1e-2, 1, device, real)
        problem = layers.bind(pretrained, finetuned, shape=tuple(anchors.shape[1:]))
        optimiser = AnchorOptimiser(problem, anchors, steps=12, lr=1e-2)
        runs.append((optimiser, step_runner(optimiser.step, device)))
    torch.cuda.synchronize()  # the next stream does not wait for the one that made all this
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(12):
            for _, run in runs:
                run()
    torch.cuda.synchronize()
    for optimiser, run in runs:
        assert run._graph is not None
        assert bool(optimiser.history.isfinite().all())
        assert optimiser.history.amin() < optimiser.history[0, 0]


@pytest.mark.card
def test_no_host_synchronisation_in_a_step(device, real):
    pretrained, finetuned, anchors = make(roberta, 1e-2, 2, device, real)
    problem = layers.bind(pretrained, finetuned, shape=tuple(anchors.shape[1:]))
    optimiser = AnchorOptimiser(problem, anchors, steps=8, lr=1e-2)
    for _ in range(3):
        optimiser.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimiser.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
