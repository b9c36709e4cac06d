"""A merged model as a LoRA adapter: merged - base by its leading singular values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fda_fast.checkpoints.card import hub_name
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.errors import InputError
from fda_fast.starting.spectrum import leading_triplets


class LoraWriter:
    """Collects the change of every tensor and writes it as a PEFT adapter on the base model.

    A linear layer's change D becomes B A with A [r, in] and B [out, r], the best approximation of
    rank r: B A = sum of the r leading singular triplets, each factor with the root of the singular
    values. What an adapter cannot hold (biases, norms, embeddings, the experts of a mixture, which
    transformers loads as one tensor) is left out and counts as lost.

    Args:
        layout: the base model.
        rank: r; matrices with a shorter side are padded with zeros.
    """

    def __init__(self, layout: ModelLayout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self._modules = _linear_modules(layout)
        self._factors: dict[str, Tensor] = {}
        self._targets: list[str] = []
        self._conv1d = False
        self._errors: dict[str, float] = {}
        self._lost = self._total = 0.0

    def add(self, name: str, merged: Tensor) -> None:
        """Take in one tensor of the merged model.

        Args:
            name: in the base.
            merged: its merged value, as computed.

        Cost: one read of the base's tensor; m n min(m, n) operations for a changed matrix [m, n].
        """
        if not merged.is_floating_point():
            return
        base = self._layout.base.read([name])[name]
        change = merged.detach().cpu().float() - base.float()
        square = change.double().square().sum().item()
        if not square:
            return
        self._total += square
        if name not in self._modules:
            self._errors[name] = 1.0
            self._lost += square
            return
        path, conv1d = self._modules[name]
        # A Conv1D stores [in, out].
        u, s, v = leading_triplets(change.T if conv1d else change, self._rank)
        lost = max(0.0, square - s.square().sum().item())
        self._errors[name] = math.sqrt(lost / square)
        self._lost += lost
        root = s.sqrt()
        a, b = (v * root).T, u * root
        key = f"base_model.model.{path}"
        self._factors[f"{key}.lora_A.weight"] = self._padded(a, 0)
        self._factors[f"{key}.lora_B.weight"] = self._padded(b, 1)
        self._targets.append(path)
        self._conv1d |= conv1d

    def _padded(self, factor: Tensor, dim: int) -> Tensor:
        shape = list(factor.shape)
        shape[dim] = self._rank
        padded = torch.zeros(shape)
        padded.narrow(dim, 0, factor.shape[dim]).copy_(factor)
        return padded

    def write(self, folder: Path) -> dict[str, Any]:
        """Write adapter_config.json and adapter_model.safetensors.

        Args:
            folder: is created.

        Returns:
            {"rank", "error", "tensors"}: the error is |D - B A| / |D| over all tensors, and for
            each changed tensor by itself; 1 for one that is left out.

        Raises:
            InputError: no linear layer differs from the base's.
            OSError: as the operating system says.
        """
        if not self._targets:
            raise InputError("out_lora", got="no linear layer of the merged model has changed")
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": hub_name(self._layout.base),
            "r": self._rank,
            "lora_alpha": self._rank,  # scaling 1
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": self._conv1d,
            "target_modules": sorted(self._targets),
            "inference_mode": True,
        }
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text)
        tensors = {name: self._factors[name] for name in sorted(self._factors)}
        (folder / "adapter_model.safetensors").write_bytes(save(tensors))
        error = math.sqrt(self._lost / self._total)
        return {"rank": self._rank, "error": error, "tensors": dict(self._errors)}


def _linear_modules(layout: ModelLayout) -> dict[str, tuple[str, bool]]:
    """{base name of a weight: (path of its module in the model, whether it is a Conv1D)}."""
    found = {}
    for path, module in layout.model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            name = layout.base_table.get(layout.names.strip(f"{path}.weight"))
            if name is not None:
                found[name] = path, isinstance(module, Conv1D)
    return found
