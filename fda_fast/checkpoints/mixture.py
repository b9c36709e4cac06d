"""The expert MLPs of a mixture-of-experts layer, found by their tensors' names.

transformers 5 loads the experts of a layer as one tensor per kind of matrix, while checkpoints hold
every expert's matrices by themselves, as transformers 4 does. The checkpoint is what is merged, so
it is the checkpoint that says what experts there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fda_fast.checkpoints.reader import Checkpoint, some
from fda_fast.errors import InputError

_TENSOR = re.compile(r"(?P<mlp>.+\.experts\.(?P<index>\d+))\.(?P<matrix>\w+)\.weight")
_MATRICES = {
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "w1": "gate_proj",  # Mixtral
    "w3": "up_proj",
    "w2": "down_proj",
}
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class ExpertMLP(nn.Module):
    """One expert: down(phi(gate(x)) * up(x)).

    Args:
        width: d, of the vectors in and out.
        hidden: of the vectors between.
        activation: phi.
    """

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        product: torch.Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        output: torch.Tensor = self.down_proj(product)
        return output


@dataclass(frozen=True)
class Expert:
    """One expert of a mixture.

    Attributes:
        name: its path in the checkpoint, without the base model's prefix.
        module: on the meta device.
        parameters: {name in the module: name in the checkpoint}.
    """

    name: str
    module: ExpertMLP
    parameters: dict[str, str]


def find_experts(
    base: Checkpoint, table: Mapping[str, str], layer: str, module: nn.Module, config: Any
) -> list[Expert]:
    """The experts of one layer, by their numbers.

    Args:
        base: the checkpoint.
        table: {canonical name: name in the checkpoint}.
        layer: canonical path of the layer.
        module: the layer in the skeleton; says what the activation is.
        config: of the model; says how many experts there are.

    Raises:
        InputError: experts stored in another form than three matrices each, some missing, or
            another number than the config has.
    """
    found: dict[str, dict[str, str]] = {}
    indices: dict[str, int] = {}
    within = f"{layer}."
    for key, name in table.items():
        match = _TENSOR.fullmatch(key) if key.startswith(within) else None
        if match is None or match["matrix"] not in _MATRICES:
            continue
        local = f"{_MATRICES[match['matrix']]}.weight"
        found.setdefault(match["mlp"], {})[local] = name
        indices[match["mlp"]] = int(match["index"])
    wanted = _count(config)
    expected = f"experts 0 to {wanted - 1}" if wanted else "experts counted from 0"
    if sorted(indices.values()) != list(range(wanted or len(indices))) or not found:
        others = [name for key, name in table.items() if key.startswith(within) and "expert" in key]
        raise InputError(
            f"layer {layer} of the {base.role} is a mixture of experts",
            expected=f"{expected}, each as gate, up and down matrices",
            got=some(sorted(found)) if found else some(others) if others else "none of them",
            fix="Save the model with a transformers version that writes every expert by itself",
        )
    activation = _activation(module, config)
    order = sorted(found, key=lambda name: indices[name])
    return [_expert(base, name, found[name], activation) for name in order]


def shared_mlps(module: nn.Module) -> list[str]:
    """Paths in a mixture's layer of the MLPs that every token goes through."""
    matrices = {"gate_proj", "up_proj", "down_proj"}
    return [
        path
        for path, part in module.named_modules()
        if matrices <= dict(part.named_children()).keys() and ".experts." not in f".{path}."
    ]


def _expert(
    base: Checkpoint, name: str, parameters: Mapping[str, str], activation: nn.Module
) -> Expert:
    locals_ = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    if set(parameters) != set(locals_):
        raise InputError(
            f"expert {name} of the {base.role}",
            expected="gate, up and down matrices",
            got=some(sorted(parameters.values())),
        )
    gate, up, down = (tuple(base.names[parameters[local]].shape) for local in locals_)
    if len(gate) != 2 or gate != up or down != gate[::-1]:
        raise InputError(
            f"expert {name} of the {base.role}",
            expected="gate and up [h, d], down [d, h]",
            got=f"{list(gate)}, {list(up)}, {list(down)}",
        )
    with torch.device("meta"):
        module = ExpertMLP(gate[1], gate[0], activation)
    return Expert(name, module.eval(), {local: parameters[local] for local in locals_})


def _activation(module: nn.Module, config: Any) -> nn.Module:
    for part in module.modules():
        found = getattr(part, "act_fn", None)
        if isinstance(found, nn.Module):
            return found
    from transformers.activations import ACT2FN

    activation: nn.Module = ACT2FN[config.hidden_act]
    return activation


def _count(config: Any) -> int:
    values: Iterable[Any] = (getattr(config, key, None) for key in _COUNTS)
    return next((value for value in values if isinstance(value, int)), 0)
