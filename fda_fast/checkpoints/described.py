"""A checkpoint that exists as a config.json alone: every name, shape and dtype, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from fda_fast.checkpoints.headers import parse_json
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.skeleton import as_saved, build_skeleton
from fda_fast.checkpoints.tensorfile import TensorInfo
from fda_fast.errors import InputError

_MAX_CONFIG = 16 << 20


class DescribedCheckpoint(Checkpoint):
    """What ``save_pretrained`` of a model with this config would write, without its weights.

    Everything but ``read`` works, so layers can be found, planned and synthesised at full size.

    Args:
        path: a config.json, or a directory with one.
        role: as in ``Checkpoint.open``.
        dtype: of floating point tensors; None: the one that config.json names, or float32.

    Raises:
        InputError: no such file, or a config that transformers cannot build.

    Cost: one skeleton on the meta device, 0.1 to 1 s.
    """

    def __init__(
        self, path: str | Path, role: str = "base model", *, dtype: torch.dtype | None = None
    ) -> None:
        path = Path(path).expanduser()
        file = path / "config.json" if path.is_dir() else path
        try:
            if file.stat().st_size > _MAX_CONFIG:
                raise InputError(str(file), expected="a config.json", got="a huge file")
            content = parse_json(file.read_bytes(), str(file))
        except OSError as error:
            raise InputError(f"{file} cannot be read", got=error.strerror) from error
        if not isinstance(content, dict):
            raise InputError(str(file), expected="a JSON object", got=type(content).__name__)
        self.path, self.role, self.directory = file, role, None
        self.config, self.adapter = content, None
        self.notes: list[str] = []
        self.aliases: dict[str, str] = {}
        self._files, self.modules = {}, {}
        self.names = MappingProxyType({})
        stored = _stored_dtype(content) if dtype is None else dtype
        self.names = MappingProxyType(_tensors(self, file, stored))

    def read(
        self, names: Iterable[str], at_hand: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Refuses: there is nothing to read.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.path} describes a model without its weights")


def _stored_dtype(config: dict[str, object]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return dtype if known and isinstance(dtype, torch.dtype) else torch.float32


def _tensors(base: Checkpoint, file: Path, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Every tensor of the skeleton's state dict as it is saved: tied ones once, experts apart."""
    model = build_skeleton(base)
    found: dict[str, TensorInfo] = {}
    seen: set[int] = set()
    state: dict[str, torch.Tensor] = {}
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if parameters.get(name) in seen:
            continue
        if name in parameters:
            seen.add(parameters[name])
        state[name] = tensor
    for name, tensor in as_saved(model, state).items():
        stored = dtype if tensor.is_floating_point() else tensor.dtype
        nbytes = tensor.numel() * stored.itemsize
        found[name] = TensorInfo(tuple(tensor.shape), stored, file, nbytes)
    return found
