"""The published ``.npy`` files of anchors, read and written.

Vision: float32 [tokens, anchors, d]. NLU: a pickled dict of arrays, ``input`` [anchors, tokens, d],
``gt`` the fine-tuned layer's output for it, ``attention_mask`` zeros [anchors, 1, tokens, tokens].
NLG: float32 [anchors, d].
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fda_fast.checkpoints.pickles import read_npy
from fda_fast.errors import InputError
from fda_fast.layers.call import call_layer

_KEYS = ("input", "gt", "attention_mask")


@dataclass(frozen=True)
class AnchorFile:
    """Anchors of one (layer, task) as they lie on disk.

    Attributes:
        path: the file.
        anchors: [n, T, d] or [n, d], float32.
        targets: NLU: the stored outputs of the fine-tuned layer, [n, T, d]; None elsewhere.
    """

    path: Path
    anchors: Tensor
    targets: Tensor | None = None

    def to(self, device: torch.device) -> AnchorFile:
        """The same on another device."""
        targets = None if self.targets is None else self.targets.to(device)
        return AnchorFile(self.path, self.anchors.to(device), targets)


def read(path: str | Path, modality: str) -> AnchorFile:
    """Read a file of either code; nothing in it is executed.

    Args:
        path: the file.
        modality: "vision", "nlu" or "nlg": what it must hold.

    Raises:
        InputError: no such file, damaged, dangerous, of another layout, not finite, or NLU
            anchors with a mask that hides tokens.
    """
    path = Path(path)
    check_present(path)
    value = read_npy(path, "anchors")
    if modality == "nlu":
        return _of_dict(path, value)
    anchors = _tensor(path, "array", value, 2 if modality == "nlg" else 3)
    if modality == "vision":
        anchors = anchors.transpose(0, 1).contiguous()
    return AnchorFile(path, anchors)


def check_present(path: Path) -> None:
    """InputError unless there is a file."""
    if not path.is_file():
        raise InputError(
            f"anchors file {path}",
            expected="a file that construct wrote with the same flags",
            got="nothing there",
            fix="Flags of construction are part of the folder's name: give adapt the same",
        )


def write(path: str | Path, anchors: Tensor, layer: nn.Module, modality: str) -> None:
    """Write a file as the published script does; it appears complete or not at all.

    Args:
        path: the file; folders are made.
        anchors: [n, T, d] or [n, d].
        layer: the fine-tuned layer, whose outputs NLU files hold.
        modality: "vision", "nlu" or "nlg".

    Raises:
        OSError: as the operating system says.
    """
    path = Path(path)
    value: Any = _array(anchors.transpose(0, 1) if modality == "vision" else anchors)
    if modality == "nlu":
        with torch.no_grad():
            target = call_layer(layer, anchors)
        n, tokens, _ = anchors.shape
        mask = np.zeros((n, 1, tokens, tokens), np.float32)
        value = dict(zip(_KEYS, (value, _array(target), mask), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        np.save(file, value)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _of_dict(path: Path, value: Any) -> AnchorFile:
    if not isinstance(value, dict) or not set(_KEYS[:2]) <= value.keys():
        raise InputError(
            f"anchors file {path}",
            expected="a dict of input, gt and attention_mask",
            got=sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__,
        )
    anchors, targets = (_tensor(path, key, value[key], 3) for key in _KEYS[:2])
    if targets.shape != anchors.shape:
        raise InputError(
            f"anchors file {path}: gt", expected=list(anchors.shape), got=list(targets.shape)
        )
    mask = value.get("attention_mask")
    if mask is not None and np.any(mask):
        raise InputError(
            f"anchors file {path}: attention_mask",
            expected="zeros: every token seen, as both codes write it",
            got="a mask that hides tokens",
        )
    return AnchorFile(path, anchors, targets)


def _tensor(path: Path, key: str, value: Any, dimensions: int) -> Tensor:
    kind = isinstance(value, np.ndarray) and value.dtype.kind
    if kind != "f" or value.ndim != dimensions or 0 in value.shape:
        shape = f"{value.dtype} {list(value.shape)}" if kind else type(value).__name__
        raise InputError(
            f"anchors file {path}: {key}", expected=f"numbers in {dimensions} dimensions", got=shape
        )
    tensor = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"anchors file {path}: {key}", expected="finite numbers", got="NaN or Inf")
    return tensor


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array
