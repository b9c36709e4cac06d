"""Which engine bind() takes, and that it says why."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.profiler import profile

from fda_fast import estimate, layers
from fda_fast.errors import InputError
from fda_fast.layers.adaptation import ProgramAdaptation
from fda_fast.layers.autograd import AutogradAdaptation, AutogradProblem
from fda_fast.layers.problem import ProgramProblem
from fda_fast.ops import memory


class GatedMLP(nn.Module):
    """A Llama-like MLP; ``twist`` makes the forward another function than the structure says."""

    def __init__(self, d=8, h=12, twist=0.0):
        super().__init__()
        self.gate_proj = nn.Linear(d, h, bias=False)
        self.up_proj = nn.Linear(d, h, bias=False)
        self.down_proj = nn.Linear(h, d, bias=False)
        self.act_fn = nn.SiLU()
        self.twist = twist

    def forward(self, x):
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y + self.twist * torch.tanh(x)


class Unknown(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.first, self.second = nn.Linear(d, d), nn.Bilinear(d, d, d)

    def forward(self, x):
        return self.second(self.first(x), x)


def tuned(layer, scale=0.02):
    torch.manual_seed(1)
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(scale * torch.randn_like(p))
    return layer


def test_a_recognised_layer_gets_its_program(caplog):
    layer = GatedMLP()
    with caplog.at_level(logging.INFO, logger="fda_fast"):
        problem = layers.bind(layer, [tuned(layer)], shape=(4, 8))
    assert isinstance(problem, ProgramProblem)
    assert not caplog.records
    assert problem.parameter_names == [name for name, _ in layer.named_parameters()]


def test_the_structure_of_one_function_with_the_forward_of_another_is_refused(caplog):
    layer = GatedMLP(twist=0.01)
    with caplog.at_level(logging.INFO, logger="fda_fast"):
        problem = layers.bind(layer, [tuned(layer)], shape=(4, 8))
    assert isinstance(problem, AutogradProblem)
    (record,) = caplog.records
    assert "output of the pretrained layer differs" in record.getMessage()
    with pytest.raises(InputError, match="output of the pretrained layer differs"):
        layers.bind(layer, [tuned(layer)], shape=(4, 8), engine="program")


def test_a_twist_in_the_finetuned_layer_alone_is_refused():
    layer = GatedMLP()
    other = tuned(layer)
    other.twist = 0.01
    problem = layers.bind(layer, [tuned(layer), other], shape=(4, 8))
    assert isinstance(problem, AutogradProblem)


def test_an_unknown_layer_runs_on_autograd_with_one_line_saying_why(caplog):
    layer = Unknown()
    with caplog.at_level(logging.INFO, logger="fda_fast"):
        problem = layers.bind(layer, [tuned(layer)], shape=(4, 8))
    assert isinstance(problem, AutogradProblem)
    (record,) = caplog.records
    assert record.getMessage().startswith("Unknown runs on the autograd engine: ")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_precision_passes_its_own_check(precision):
    layer = GatedMLP()
    problem = layers.bind(layer, [tuned(layer)], shape=(4, 8), precision=precision)
    assert isinstance(problem, ProgramProblem)


def test_adaptation_likewise():
    layer, x = GatedMLP(), torch.randn(4, 8)
    assert isinstance(layers.bind_adaptation(layer, [(x, tuned(layer))]), ProgramAdaptation)
    twisted = GatedMLP(twist=0.01)
    tasks = [(x, tuned(twisted))]
    assert isinstance(layers.bind_adaptation(twisted, tasks), AutogradAdaptation)


@pytest.mark.parametrize("argument", ["engine", "precision", "distance"])
def test_unknown_names_are_refused(argument):
    layer = GatedMLP()
    with pytest.raises(InputError, match=argument):
        layers.bind(layer, [tuned(layer)], shape=(4, 8), **{argument: "other"})


def test_anchors_of_another_shape_are_refused():
    layer = GatedMLP()
    problem = layers.bind(layer, [tuned(layer)], shape=(4, 8))
    with pytest.raises(InputError, match="anchors"):
        problem.evaluate(torch.randn(2, 4, 8))


def test_binding_takes_no_more_copies_of_the_weights_than_a_plan_says(monkeypatch):
    """The layer's own gradient and the program never lie in memory together."""
    monkeypatch.setattr(memory, "_SMALLEST", 1 << 60)  # all of torch's allocator, which is watched
    pretrained = GatedMLP(256, 704)
    tuned = copy.deepcopy(pretrained)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    bind = lambda: layers.bind(pretrained, [tuned], shape=(4, 256), engine="program")  # noqa: E731
    bind()
    with profile(profile_memory=True) as profiler:
        bind()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    copies = peak / sum(p.nbytes for p in pretrained.parameters())
    assert 0.9 * copies <= estimate._COPIES_CHECK["mlp"] <= 1.1 * copies
