"""Is a program the layer it was recognised from? Checked on a little random input before use."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fda_fast.layers.autograd import AutogradProblem
from fda_fast.layers.call import call_layer
from fda_fast.layers.parameter import Materials
from fda_fast.layers.problem import ProgramProblem

# Two anchors are enough for every operation and every parameter to take part.
_ANCHORS = 2
# Relative rounding error of a product's operands.
_ROUNDING = {"tf32": 2**-11, "bf16": 2**-8}
# A forward of some dozen operations may lose this many times the rounding of one: in float32 sums
# count as well, and the layer's own rounding.
_OUTPUT_FACTOR = {"fp32": 200, "tf32": 10, "bf16": 10}
# Float32 autograd loses some hundred roundings over |dy| / |y| in its gradient (330 seen, an MLP of
# width 1024). A wrong derivative is wrong in its first digit.
_GRADIENT_FACTOR = 3000
_GRADIENT_SLACK = 0.02
# Where autograd's gradient would be mostly noise there is nothing to compare with.
_LARGEST_SLACK = 0.5


class Mismatch(Exception):
    """A program and its layer disagree; the message says where and by how much."""


@torch.no_grad()
def verify(
    problem: ProgramProblem,
    materials: Materials,
    pretrained: nn.Module,
    finetuned: Sequence[nn.Module],
    shape: tuple[int, ...],
    distance: str,
) -> None:
    """Compare the outputs of both branches, and the gradient of the first task, with the layer's.

    Args:
        problem: the program.
        materials: what it was built from.
        pretrained: the layer.
        finetuned: the K fine-tuned layers.
        shape: of the anchors, [n, (T,) d].
        distance: as the problem's.

    Raises:
        Mismatch: beyond what rounding explains.

    Cost: two forwards per task and one autograd step, at two anchors.
    """
    dtype, device = materials.dtype, materials.device
    generator = torch.Generator().manual_seed(0)
    size = (len(finetuned), _ANCHORS, *shape[1:])
    anchors = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
    # The layers first: autograd's step holds several copies of the weights, and the program has not
    # read any yet.
    layers = [_in(dtype, layer) for layer in (pretrained, *finetuned)]
    expected = [
        (call_layer(layers[0], x), call_layer(tuned, x))
        for x, tuned in zip(anchors, layers[1:], strict=True)
    ]
    unit = 2**-53 if dtype == torch.float64 else 2**-24
    name = "fp32" if dtype == torch.float64 else materials.precision.name
    rounding = _OUTPUT_FACTOR[name] * (unit if name == "fp32" else _ROUNDING[name])
    base, tuned = expected[0]
    moved = float((tuned - base).norm() / base.norm())
    slack = _GRADIENT_SLACK + rounding
    slack = slack + _GRADIENT_FACTOR * unit / moved if moved > 0 else torch.inf
    gradient = None
    if slack <= _LARGEST_SLACK:
        oracle = AutogradProblem(layers[0], layers[1:2], distance=distance)
        gradient = oracle.evaluate(anchors[:1]).grad[0]
        del oracle
    del layers
    y, dy = problem.outputs(anchors)
    for k, (base, tuned) in enumerate(expected):
        _compare("output of the pretrained layer", y[k], base, rounding)
        _compare(f"output of fine-tuned layer {k}", y[k] + dy[k], tuned, rounding)
    if gradient is not None:
        ours = problem.evaluate(anchors).grad[0]
        _compare("gradient of the alignment loss", ours, gradient, slack)


def _compare(what: str, ours: Tensor, theirs: Tensor, slack: float) -> None:
    error = float((ours.reshape(-1) - theirs.reshape(-1)).norm() / theirs.norm())
    if not error <= slack:
        raise Mismatch(f"its program's {what} differs by {error:.1e} (at most {slack:.1e})")


def _in(dtype: torch.dtype, layer: nn.Module) -> nn.Module:
    """The layer in the program's dtype; itself if it is."""
    if all(p.dtype == dtype for p in layer.parameters()):
        return layer
    return copy.deepcopy(layer).to(dtype)
