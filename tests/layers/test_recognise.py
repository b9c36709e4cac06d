"""Recognised blocks: every family's program against double backward through the block itself."""

import pytest
import torch
import torch.nn.functional as F
from blocks import BLOCKS, WIDTH, OpenClipBlock, make_anchors, make_blocks
from torch import nn

from fda_fast.layers.adaptation import ProgramAdaptation
from fda_fast.layers.autograd import AutogradAdaptation, AutogradProblem
from fda_fast.layers.engine import bind
from fda_fast.layers.parameter import Materials
from fda_fast.layers.precision import Precision
from fda_fast.layers.problem import ProgramProblem
from fda_fast.layers.recognise import recognise
from fda_fast.layers.recognise_parts import NotRecognised

KEY_BIAS = {
    "bert": "attention.self.key.bias",
    "roberta": "attention.self.key.bias",
    "vit": "attention.k_proj.bias",
    "clip": "self_attn.k_proj.bias",
    "clip-text": "self_attn.k_proj.bias",
    "dinov2": "attention.k_proj.bias",
    "dinov2-swiglu": "attention.k_proj.bias",
    "siglip": "self_attn.k_proj.bias",
}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def program(layer, finetuned, tokens, distance="cosine"):
    dtype = next(layer.parameters()).dtype
    precision = Precision("fp32")
    materials = Materials(layer, finetuned, tokens=tokens, precision=precision, dtype=dtype)
    return ProgramProblem(recognise(layer).build(materials), materials, distance=distance)


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_double_backward_in_float64(name):
    layer, finetuned = make_blocks(name, tasks=2, ratio=0.05)
    anchors = make_anchors(2, 3, 5)
    ours = program(layer, finetuned, 5).evaluate(anchors)
    theirs = AutogradProblem(layer, finetuned).evaluate(anchors)
    assert relative(ours.loss, theirs.loss) < 1e-10
    assert relative(ours.cosines, theirs.cosines) < 1e-10
    assert relative(ours.grad, theirs.grad) < 1e-10


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_other_distances(name, distance):
    layer, finetuned = make_blocks(name, tasks=2, ratio=0.05)
    anchors = make_anchors(2, 3, 5)
    ours = program(layer, finetuned, 5, distance).evaluate(anchors)
    theirs = AutogradProblem(layer, finetuned, distance=distance).evaluate(anchors)
    assert relative(ours.cosines, theirs.cosines) < 1e-10
    assert relative(ours.grad, theirs.grad) < 1e-10


@pytest.mark.parametrize("name", BLOCKS)
def test_names_every_parameter_and_the_zero_gradients(name):
    layer, finetuned = make_blocks(name, tasks=1, ratio=0.05)
    recipe = recognise(layer)
    assert sorted(recipe.part.names()) == sorted(n for n, _ in layer.named_parameters())
    expected = {KEY_BIAS[name]} if name in KEY_BIAS else set()
    assert recipe.zero_gradient == expected
    assert recipe.sequences == ("mlp" not in name)
    # What is called zero is zero, and nothing else is: its cosine without the exception.
    anchors = make_anchors(1, 4, 5)
    problem = AutogradProblem(layer, finetuned, zero_gradient=())
    cosines = problem.evaluate(anchors).cosines[0]
    for one, cosine in zip(problem.parameter_names, cosines, strict=True):
        assert (cosine.abs() < 1e-6) == (one in expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "bert", "gpt2", "dinov2"])
def test_untouched_float32_modules(name):
    """The modules as their library ships them, at the accuracy float32 leaves."""
    layer, finetuned = make_blocks(name, tasks=2, ratio=0.1, dtype=torch.float32)
    anchors = make_anchors(2, 3, 5, dtype=torch.float32)
    ours = program(layer, finetuned, 5).evaluate(anchors)
    theirs = AutogradProblem(layer, finetuned).evaluate(anchors)
    assert relative(ours.cosines, theirs.cosines) < 2e-5
    assert relative(ours.grad, theirs.grad) < 1e-4


@pytest.mark.parametrize("name", ["llama-mlp", "gemma2-mlp"])
def test_mlp_on_vectors(name):
    layer, finetuned = make_blocks(name, tasks=2, ratio=0.05)
    anchors = make_anchors(2, 7, 1)[:, :, 0]
    ours = program(layer, finetuned, 1).evaluate(anchors)
    theirs = AutogradProblem(layer, finetuned).evaluate(anchors)
    assert ours.grad.shape == anchors.shape
    assert relative(ours.grad, theirs.grad) < 1e-10


def test_one_token_per_anchor():
    # softmax over one place is constant: all of q and k has gradient zero, and no NaN appears
    layer, finetuned = make_blocks("llama", tasks=1, ratio=0.05)
    anchors = make_anchors(1, 4, 1)
    ours = program(layer, finetuned, 1).evaluate(anchors)
    theirs = AutogradProblem(layer, finetuned).evaluate(anchors)
    assert relative(ours.grad, theirs.grad) < 1e-10
    assert relative(ours.cosines, theirs.cosines) < 1e-10


def test_open_clip_itself():
    transformer = pytest.importorskip("open_clip.transformer", exc_type=ImportError)
    for batch_first in (True, False):
        ours = OpenClipBlock(batch_first, quick=False)
        theirs = transformer.ResidualAttentionBlock(WIDTH, 4, 40 / WIDTH, batch_first=batch_first)
        theirs.load_state_dict(ours.state_dict())
        assert recognise(theirs).part == recognise(ours).part
        x = torch.randn(3, 5, WIDTH)
        torch.testing.assert_close(theirs(x), ours(x))


class Extra(OpenClipBlock):
    def __init__(self):
        super().__init__(batch_first=True)
        self.ls_3 = nn.Linear(WIDTH, WIDTH)


class OddActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.act = F.mish


class OddNorm(OpenClipBlock):
    def __init__(self):
        super().__init__(batch_first=True)
        self.ln_1 = nn.GroupNorm(4, WIDTH)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 3)), "Sequential has the structure of no known"),
        (Extra(), r"ls_3\.bias, ls_3\.weight as well"),
        (OddActivation(), "mish is not one of"),
        (OddNorm(), "ln_1"),
    ],
)
def test_refuses_with_a_reason(layer, reason):
    with pytest.raises(NotRecognised, match=reason):
        recognise(layer)


def test_norms_told_apart_whatever_their_weights():
    for name in ("gemma3-global", "qwen3"):
        layer, _ = make_blocks(name, tasks=0, ratio=0.1, dtype=torch.float32)
        offset = recognise(layer).part.parts[0].parts[0].offset
        assert offset == (1.0 if "gemma" in name else 0.0)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen3", "bert", "gpt2", "dinov2", "clip-text"]
)
def test_adaptation_equals_autograd(name, distance, merged):
    layer, finetuned = make_blocks(name, tasks=2, ratio=0.05)
    tasks = list(zip(make_anchors(2, 4, 5), finetuned, strict=True))
    ours = ProgramAdaptation(
        recognise(layer).build,
        layer,
        tasks,
        distance=distance,
        precision=Precision("fp32"),
        dtype=torch.float64,
        merged=merged,
    )
    theirs = AutogradAdaptation(layer, tasks, distance=distance)
    generator = torch.Generator().manual_seed(3)
    for problem in (ours, theirs):
        generator.manual_seed(3)
        for parameter, delta in zip(layer.parameters(), problem.deltas.values(), strict=True):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            delta.copy_(0.02 * noise.view(delta.shape))
        problem.refresh()
    index = torch.tensor([7, 0, 3, 5])
    assert relative(ours.evaluate(index), theirs.evaluate(index)) < 1e-10
    for one in theirs.parameter_names:
        got = ours.gradients[one].view_as(theirs.gradients[one])
        # The gradient of a key bias is zero: compare with that of the key weights.
        scale = theirs.gradients[one.replace(".bias", ".weight")].norm()
        assert (got - theirs.gradients[one]).norm() < 1e-10 * scale


@pytest.mark.parametrize("name", BLOCKS)
def test_bind_trusts_every_family(name):
    layer, finetuned = make_blocks(name, tasks=2, ratio=0.05, dtype=torch.float32)
    problem = bind(layer, finetuned, shape=(3, 5, WIDTH), engine="program")
    assert isinstance(problem, ProgramProblem)
