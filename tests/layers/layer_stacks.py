"""Plain layers with their programs, for tests: every tensor in the module's own dtype.

(Hugging Face's modules compute some things in float32 whatever their dtype; these do not.)
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from fda_fast.layers.activation import Activation
from fda_fast.layers.combinators import Residual, Sequential
from fda_fast.layers.gated import GatedActivation
from fda_fast.layers.linear import Linear
from fda_fast.layers.norm import LayerScale, Norm
from fda_fast.layers.parameter import Materials
from fda_fast.layers.program import Node

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class SwiGLU(nn.Module):
    def __init__(self, d=12, h=20, kind="silu"):
        super().__init__()
        self.gate = nn.Linear(d, h, bias=False)
        self.up = nn.Linear(d, h, bias=False)
        self.down = nn.Linear(h, d, bias=False)
        self.kind = kind

    def forward(self, x):
        return self.down(ACTIVATIONS[self.kind](self.gate(x)) * self.up(x))

    def program(self, m: Materials, prefix="", form="auto") -> Node:
        weights = [m.parameter(f"{prefix}{name}.weight") for name in ("gate", "up")]
        return Sequential(
            [
                Linear(weights, None, m.precision, form),
                GatedActivation(self.kind),
                Linear([m.parameter(f"{prefix}down.weight")], None, m.precision, form),
            ]
        )


class MLP(nn.Module):
    def __init__(self, d=12, h=20, kind="gelu"):
        super().__init__()
        self.fc1 = nn.Linear(d, h)
        self.fc2 = nn.Linear(h, d)
        self.kind = kind

    def forward(self, x):
        return self.fc2(ACTIVATIONS[self.kind](self.fc1(x)))

    def program(self, m: Materials, prefix="", form="auto") -> Node:
        fc1, fc2 = (
            Linear(
                [m.parameter(f"{prefix}{name}.weight")],
                [m.parameter(f"{prefix}{name}.bias")],
                m.precision,
                form,
            )
            for name in ("fc1", "fc2")
        )
        return Sequential([fc1, Activation(self.kind), fc2])


class PreNorm(nn.Module):
    """x + gamma * MLP(LayerNorm(x)), then + SwiGLU(RMSNorm(.)), RMSNorm multiplying by 1 + w."""

    def __init__(self, d=12, h=20, kind="gelu"):
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.mlp1 = MLP(d, h, kind)
        self.gamma = nn.Parameter(torch.rand(d))
        self.norm2 = RMSNorm(d)
        self.mlp2 = SwiGLU(d, h)

    def forward(self, x):
        x = x + self.gamma * self.mlp1(self.norm1(x))
        return x + self.mlp2(self.norm2(x))

    def program(self, m: Materials, form="auto") -> Node:
        norm1 = Norm("layer", m.parameter("norm1.weight"), m.parameter("norm1.bias"), 1e-5)
        norm2 = Norm("rms", m.parameter("norm2.weight", offset=1.0), None, 1e-6)
        scale = LayerScale(m.parameter("gamma"))
        return Sequential(
            [
                Residual(Sequential([norm1, self.mlp1.program(m, "mlp1.", form), scale])),
                Residual(Sequential([norm2, self.mlp2.program(m, "mlp2.", form)])),
            ]
        )


class PostNorm(nn.Module):
    """LayerNorm(x + MLP(x)), then the same again."""

    def __init__(self, d=12, h=20, kind="gelu"):
        super().__init__()
        self.mlp1, self.mlp2 = MLP(d, h, kind), MLP(d, h, kind)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        x = self.norm1(x + self.mlp1(x))
        return self.norm2(x + self.mlp2(x))

    def program(self, m: Materials, form="auto") -> Node:
        nodes = []
        for i in (1, 2):
            mlp = getattr(self, f"mlp{i}")
            nodes.append(Residual(mlp.program(m, f"mlp{i}.", form)))
            weight, bias = (m.parameter(f"norm{i}.{name}") for name in ("weight", "bias"))
            nodes.append(Norm("layer", weight, bias, 1e-5))
        return Sequential(nodes)


STACKS = {"swiglu": SwiGLU, "mlp": MLP, "pre_norm": PreNorm, "post_norm": PostNorm}


def make_layers(stack: str, tasks: int, ratio: float, dtype=torch.float64, seed=0, **sizes):
    """A pretrained layer and ``tasks`` fine-tuned ones, |tau| = ratio |theta| for each tensor."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # biases keep the initialisation of torch
    layer = STACKS[stack](**sizes).to(torch.float64).eval()
    with torch.no_grad():
        for p in layer.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
                p.mul_(p.shape[1] ** -0.5)
            else:
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        finetuned = []
        for _ in range(tasks):
            tuned = copy.deepcopy(layer)
            for p in tuned.parameters():
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.add_(noise * (ratio * p.norm() / noise.norm()))
            finetuned.append(tuned.to(dtype))
    return layer.to(dtype), finetuned


def make_anchors(tasks: int, anchors: int, tokens: int, width: int, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (tasks, anchors, tokens, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
