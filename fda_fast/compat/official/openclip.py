"""open_clip image encoders as the Vision scripts keep them: one file per model, no config."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fda_fast.checkpoints.align import check_finite
from fda_fast.checkpoints.openclip import QuickGELU, ResidualAttentionBlock
from fda_fast.checkpoints.outputs import check_disk
from fda_fast.checkpoints.pickles import Record
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

_BLOCK = re.compile(r"^(.*visual\.transformer\.resblocks\.)(\d+)\.(.+)$")
_POSITIONS = "visual.positional_embedding"


class OpenClip:
    """The image blocks of a pretrained open_clip encoder and of its fine-tunes.

    Args:
        pretrained: file of the pretrained encoder: a pickled module or state dict, safetensors.
        experts: files of the fine-tuned encoders by task.
        device: where layers are built.
        head_width: width of an attention head. Default: what a pickled module says, else 64 as in
            every published CLIP.
        activation: "quick_gelu" (OpenAI's weights) or "gelu". Default: what a pickled module says,
            else "quick_gelu".

    Attributes:
        tasks: in order.
        n_layers: image blocks of each encoder.
        width: d.
        tokens: T of an image, 0 if the file has no position embeddings.

    Raises:
        InputError: a file that cannot be read, or is of another architecture.
    """

    def __init__(
        self,
        pretrained: Path,
        experts: Mapping[str, Path],
        device: torch.device,
        *,
        head_width: int | None = None,
        activation: str | None = None,
    ) -> None:
        self.device = device
        self.base = Checkpoint.open(pretrained, "pretrained encoder")
        self._names = block_names(self.base)
        self.n_layers = len(self._names)
        self.tasks = list(experts)
        self._experts = {
            task: self._match(Checkpoint.open(path, f"encoder of {task}"))
            for task, path in experts.items()
        }
        shapes = {local: self.base.names[name].shape for local, name in self._names[0].items()}
        try:
            self._hidden, self.width = shapes["mlp.c_fc.weight"]
        except (KeyError, ValueError):
            raise InputError(
                f"the {self.base.role} {pretrained}: block 0",
                expected="mlp.c_fc.weight of two dimensions",
                got=sorted(shapes),
            ) from None
        heads, said = _structure(self.base, self._prefix)
        self._activation = activation or said or "quick_gelu"
        head_width = head_width or (self.width // heads if heads else 64)
        if self.width % head_width:
            raise InputError(
                "--head_width", expected=f"a divisor of the width {self.width}", got=head_width
            )
        self._heads = self.width // head_width
        self.tokens = next(
            (info.shape[0] for n, info in self.base.names.items() if n.endswith(_POSITIONS)), 0
        )

    def read(self, index: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Block ``index`` of the pretrained encoder and, by task, of the experts; float32."""
        names = self._names[index]
        pretrained = self._build(self.base, names)
        return pretrained, {
            task: self._build(*self._renamed(task, names)) for task in self._experts
        }

    def read_merged(self, path: Path, index: int) -> dict[str, Tensor]:
        """Block ``index`` of another encoder of the kind, by names in the block."""
        checkpoint, prefix = self._match(Checkpoint.open(path, "merged encoder"))
        names = {k: _swap(name, self._prefix, prefix) for k, name in self._names[index].items()}
        tensors = _read(checkpoint, list(names.values()))
        return {local: tensors[name].to(self.device) for local, name in names.items()}

    def global_names(self, index: int) -> dict[str, str]:
        """{name in block ``index``: name in the pretrained encoder}."""
        return dict(self._names[index])

    @property
    def _prefix(self) -> str:
        found = _BLOCK.match(next(iter(self._names[0].values())))
        assert found is not None
        return found[1]

    def _renamed(self, task: str, names: Mapping[str, str]) -> tuple[Checkpoint, dict[str, str]]:
        checkpoint, prefix = self._experts[task]
        return checkpoint, {k: _swap(name, self._prefix, prefix) for k, name in names.items()}

    def _match(self, checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
        """The checkpoint and its prefix of block names, after holding it against the base."""
        theirs = block_names(checkpoint)
        where = f"the {checkpoint.role} {checkpoint.path}"
        if len(theirs) != self.n_layers:
            raise InputError(f"{where}: blocks", expected=self.n_layers, got=len(theirs))
        for index, names in enumerate(self._names):
            for local, name in names.items():
                wanted = self.base.names[name].shape
                other = theirs[index].get(local)
                got = None if other is None else checkpoint.names[other].shape
                if got != wanted:
                    raise InputError(
                        f"{where}: {local} of block {index}",
                        expected=list(wanted),
                        got="missing" if got is None else list(got),
                    )
        found = _BLOCK.match(next(iter(theirs[0].values())))
        assert found is not None
        return checkpoint, found[1]

    def _build(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> nn.Module:
        tensors = _read(checkpoint, list(names.values()))
        with torch.device("meta"):
            gelu = QuickGELU() if self._activation == "quick_gelu" else nn.GELU()
            block = ResidualAttentionBlock(self.width, self._hidden, self._heads, gelu)
        expected = {name: list(p.shape) for name, p in block.named_parameters()}
        got = {local: list(tensors[name].shape) for local, name in names.items()}
        if expected != got:
            local = next(n for n in (*expected, *got) if expected.get(n) != got.get(n))
            raise InputError(
                f"the {checkpoint.role} {checkpoint.path}: {local} of a block",
                expected=expected.get(local, "no such tensor"),
                got=got.get(local, "missing"),
                fix="Only plain open_clip blocks (ViT-B-32, ViT-B-16, ViT-L-14) are taken",
            )
        block.load_state_dict({k: tensors[n].float() for k, n in names.items()}, assign=True)
        return block.to(self.device).eval()


class OpenClipWriter:
    """The merged encoder: safetensors, and the same tensors as a plain state dict in ``.pt``.

    Args:
        folder: where both files go; made if need be.
        stem: their name without a suffix.
        models: the encoders.
    """

    def __init__(self, folder: Path, stem: str, models: OpenClip) -> None:
        self._folder, self._stem, self._models = folder, stem, models
        self._layers: dict[str, Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        check_disk(folder, 2 * models.base.nbytes)

    def add(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take the merged tensors of a block, by names in the block."""
        names = self._models.global_names(index)
        for local, tensor in tensors.items():
            self._layers[names[local]] = tensor.detach().float().cpu().contiguous()

    def finish(self) -> list[Path]:
        """Write both files, everything outside the blocks as in the pretrained encoder."""
        state = self._models.base.read(self._models.base.names)
        state.update(self._layers)
        # Tied tensors share memory, which safetensors refuses; the copies are equal.
        state = {name: tensor.clone() for name, tensor in state.items()}
        paths = [self._folder / f"{self._stem}{suffix}" for suffix in (".safetensors", ".pt")]
        for path in paths:
            partial = path.with_name(f".{path.name}.partial")
            if path.suffix == ".pt":
                torch.save(state, partial)
            else:
                save_file(state, partial)
            os.replace(partial, path)
        return paths

    def close(self) -> None:
        """Nothing is on disk before ``finish``."""


def block_names(checkpoint: Checkpoint) -> list[dict[str, str]]:
    """For every image block {name in the block: name in the checkpoint}.

    Raises:
        InputError: no image blocks, or gaps in their numbers.
    """
    found: dict[int, dict[str, str]] = {}
    for name in checkpoint.names:
        match = _BLOCK.match(name)
        if match:
            found.setdefault(int(match[2]), {})[match[3]] = name
    if sorted(found) != list(range(len(found))) or not found:
        raise InputError(
            f"the {checkpoint.role} {checkpoint.path}",
            expected="tensors visual.transformer.resblocks.0..., without gaps",
            got=sorted(found) or _first(checkpoint.names),
        )
    return [found[index] for index in range(len(found))]


def _structure(checkpoint: Checkpoint, prefix: str) -> tuple[int, str]:
    """(heads, activation) of block 0 as a pickled module tells them; (0, "") where none does."""
    found: Any = next(iter(checkpoint.modules.values()), None)
    for name in (*prefix.rstrip(".").split("."), "0"):
        found = found.get(name) if isinstance(found, Record) else None
    if not isinstance(found, Record):
        return 0, ""
    attention, mlp = found.get("attn"), found.get("mlp")
    heads = attention.get("num_heads") if isinstance(attention, Record) else 0
    gelu = mlp.get("gelu") if isinstance(mlp, Record) else None
    kinds = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
    kind = kinds.get(gelu.kind, "") if isinstance(gelu, Record) else ""
    return heads if isinstance(heads, int) else 0, kind


def _read(checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    tensors = checkpoint.read(names)
    for name, tensor in tensors.items():
        check_finite(name, tensor, checkpoint.role)
    return tensors


def _swap(name: str, prefix: str, other: str) -> str:
    return other + name.removeprefix(prefix)


def _first(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])
