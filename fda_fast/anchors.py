"""Anchors: how they start, and the file that holds those of one (layer, task).

Initialisation follows the published code (FDA, arXiv 2510.21223v1, section 2.4 and the official
construct_fda.py): standard normal times sigma, or rows of the fine-tuned layer's own weights.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fda_fast.curve import Curve
from fda_fast.errors import InputError

Scheme = Literal["weights", "gaussian"]
Layout = Literal["anchor_first", "token_first"]

FORMAT_VERSION = "1"
_TENSOR = "anchors"
_KEYS = ("format_version", "layer", "task", "settings", "cosines", "loss", "pretrained_sha256",
         "expert_sha256")  # fmt: skip


def init_anchors(
    finetuned_layer: nn.Module,
    shape: Sequence[int],
    scheme: Scheme = "weights",
    scale: float = 0.01,
    generator: torch.Generator | None = None,
    *,
    layout: Layout = "anchor_first",
) -> Tensor:
    """First anchors of one (layer, task), as published.

    ``"gaussian"``: standard normal times ``scale``.

    ``"weights"``: rows of every 2-D parameter of the fine-tuned layer whose second dimension is
    the width, collected in parameter order, unscaled. A GPT-2 ``Conv1D`` stores its matrix
    [in, out], so the vectors of the input space are its columns: it counts, transposed, where its
    *first* dimension is the width. With enough rows a random permutation decides which are
    used; with too few, all of them come first, in order, followed by midpoints of two rows drawn
    uniformly with replacement.

    Args:
        finetuned_layer: the layer of the expert; its parameters are read only.
        shape: [n, T, d] for n anchors of T tokens, or [n, d] for n single vectors.
        scheme: "weights" or "gaussian".
        scale: sigma of the Gaussian; unused by "weights". Positive and finite.
        generator: source of the random numbers, on the CPU or on a CUDA device; the global CPU
            generator if None. Numbers are drawn on the generator's device and then moved, so one
            CPU generator gives the same anchors wherever the layer lives.
        layout: which index of a 3-D shape runs fastest while rows are dealt out: "anchor_first"
            (the published RoBERTa code, [n, T, d]) fills one anchor after the other; "token_first"
            (the published vision code, [T, n, d]) fills token 0 of every anchor, then token 1, ...
            The result is [n, T, d] either way. Only the midpoints of too few rows are affected
            in distribution: with "token_first" every anchor begins with true rows.

    Returns:
        Tensor of ``shape``, contiguous, without gradient, on the layer's device; float32, or
        float64 if the layer is float64.

    Raises:
        InputError: unusable shape, scheme, scale or layout, or no eligible row.

    Source: the paper, section 2.4; official utils (init_by_gauss_random, init_by_weights).
    """
    dims = _check_shape(shape)
    if layout not in ("anchor_first", "token_first"):
        raise InputError("layout", expected="'anchor_first' or 'token_first'", got=repr(layout))
    device, dtype = _placement(finetuned_layer)
    drawn = dims
    if layout == "token_first" and len(dims) == 3:
        drawn = (dims[1], dims[0], dims[2])
    if scheme == "gaussian":
        if not (math.isfinite(scale) and scale > 0):
            raise InputError("scale", expected="a positive finite number", got=scale)
        where = generator.device if generator is not None else torch.device("cpu")
        values = torch.randn(drawn, generator=generator, device=where, dtype=dtype) * scale
    elif scheme == "weights":
        rows = _weight_rows(finetuned_layer, dims[-1], dtype)
        values = _sample_rows(rows, math.prod(dims[:-1]), generator).reshape(drawn)
    else:
        raise InputError("anchor scheme", expected="'weights' or 'gaussian'", got=repr(scheme))
    if drawn != dims:
        values = values.transpose(0, 1)
    return values.to(device).contiguous()


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    dims = tuple(int(size) for size in shape)
    if len(dims) not in (2, 3) or min(dims) < 1:
        raise InputError("anchor shape", expected="[n, T, d] or [n, d], all positive", got=dims)
    return dims


def _placement(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(layer.parameters(), None)
    if first is None:
        return torch.device("cpu"), torch.float32
    return first.device, torch.float64 if first.dtype == torch.float64 else torch.float32


def _weight_rows(layer: nn.Module, width: int, dtype: torch.dtype) -> Tensor:
    """Rows [r, width] of the eligible parameters, in parameter order."""
    # By name and attribute, not by isinstance: transformers has moved the class between modules.
    conv1d = {
        id(module.weight)
        for module in layer.modules()
        if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
    }
    found = []
    for parameter in layer.parameters():
        if parameter.ndim != 2:
            continue
        matrix = parameter.detach()
        matrix = matrix.T if id(parameter) in conv1d else matrix
        if matrix.shape[1] == width:
            found.append(matrix.to(dtype))
    if not found:
        raise InputError(
            "weight rows for the anchors",
            expected=f"a 2-D parameter whose second dimension is {width}",
            got=sorted({tuple(p.shape) for p in layer.parameters() if p.ndim == 2}),
            fix="Use scheme='gaussian', or the layer's input width as the last dimension",
        )
    return torch.cat(found)


def _sample_rows(rows: Tensor, needed: int, generator: torch.Generator | None) -> Tensor:
    where = generator.device if generator is not None else torch.device("cpu")
    count = rows.shape[0]
    if count >= needed:
        order = torch.randperm(count, generator=generator, device=where)[:needed]
        return rows[order.to(rows.device)]
    # One draw [m, 2] consumes a CPU generator exactly like the published 2 m single draws.
    pairs = torch.randint(count, (needed - count, 2), generator=generator, device=where)
    pairs = pairs.to(rows.device)
    return torch.cat([rows, (rows[pairs[:, 0]] + rows[pairs[:, 1]]) / 2])


@dataclass(frozen=True)
class Anchors:
    """Finished anchors of one (layer, task), with what they were made from.

    Attributes:
        tensor: [n, T, d] or [n, d], float32.
        layer: name of the layer in the base model, e.g. "encoder.layer.3".
        task: name of the expert.
        settings: how they were constructed; anything JSON can hold.
        cosines: cosine between gradient and task vector, per parameter name of the layer.
        loss: alignment loss of ``tensor``: sum over parameter tensors of 1 - cosine.
        pretrained_sha256, expert_sha256: hashes of the layer's tensors in the two checkpoints
            (``fda_fast.checkpoints.hashing``); "" if unknown.
        history: the alignment loss over the steps of construction; None if unknown.
    """

    tensor: Tensor
    layer: str
    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    cosines: Mapping[str, float] = field(default_factory=dict)
    loss: float = math.nan
    pretrained_sha256: str = ""
    expert_sha256: str = ""
    history: Curve | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically and reproducibly.

        The file appears complete or not at all (temporary file in the same directory, fsync,
        rename), and identical anchors give identical bytes: the header is written here with
        sorted keys, because the safetensors writer orders metadata by a per-process hash.

        Raises:
            InputError: ``tensor`` is not float32 of 2 or 3 dimensions, or ``settings`` is not JSON.
            OSError: the file cannot be written; the temporary file is removed.
        """
        dims = _check_shape(self.tensor.shape)
        if self.tensor.dtype != torch.float32:
            raise InputError("anchors to save", expected="float32", got=self.tensor.dtype)
        metadata = {
            "format_version": FORMAT_VERSION,
            "layer": self.layer,
            "task": self.task,
            "settings": _to_json("settings", self.settings),
            "cosines": _to_json("cosines", self.cosines),
            "loss": repr(float(self.loss)),
            "pretrained_sha256": self.pretrained_sha256,
            "expert_sha256": self.expert_sha256,
        }
        if self.history is not None:
            metadata["history"] = _to_json("history", self.history.as_record())
        entry = {"dtype": "F32", "shape": dims, "data_offsets": [0, 4 * math.prod(dims)]}
        header = json.dumps({"__metadata__": metadata, _TENSOR: entry}, sort_keys=True).encode()
        header += b" " * (-len(header) % 8)
        values = self.tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
        _write_atomically(Path(path), len(header).to_bytes(8, "little") + header, values.data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, shape: Sequence[int] | None = None) -> Anchors:
        """Read a file written by ``save``.

        Args:
            path: the file.
            shape: if given, the shape the tensor must have.

        Raises:
            InputError: not a readable safetensors file, not an anchors file, another format
                version, or another shape than asked for.
            FileNotFoundError: no such file.
        """
        name = f"anchors file {os.fspath(path)}"
        if not Path(path).exists():
            raise FileNotFoundError(f"{name}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = list(file.keys())
                # Memory of its own: a mapped file's has no alignment, on which the last bits of a
                # product can depend (seen: MKL on AMD).
                tensor = file.get_tensor(_TENSOR).clone() if _TENSOR in names else None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{name} is unreadable", got=str(error)) from error
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{name}: format version", expected=FORMAT_VERSION, got=version or "none"
            )
        missing = [key for key in _KEYS if key not in metadata]
        if missing or tensor is None:
            raise InputError(f"{name} lacks", got=missing or f"tensor {_TENSOR!r}")
        if tensor.dtype != torch.float32 or tensor.ndim not in (2, 3):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise InputError(name, expected="float32 [n, T, d] or [n, d]", got=got)
        if shape is not None and tuple(shape) != tuple(tensor.shape):
            raise InputError(f"{name}: shape", expected=tuple(shape), got=tuple(tensor.shape))
        try:
            parsed = {key: json.loads(metadata[key]) for key in ("settings", "cosines")}
            loss = float(metadata["loss"])
            history = None
            if "history" in metadata:
                history = Curve.from_record(json.loads(metadata["history"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{name}: damaged metadata", got=str(error)) from error
        hashes = {key: metadata[key] for key in ("pretrained_sha256", "expert_sha256")}
        return cls(
            tensor,
            metadata["layer"],
            metadata["task"],
            loss=loss,
            history=history,
            **parsed,
            **hashes,
        )


def _to_json(what: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(value), sort_keys=True)
    except TypeError as error:
        raise InputError(f"anchors {what}", expected="JSON values", got=str(error)) from error


def _write_atomically(path: Path, *chunks: bytes | memoryview) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Not tempfile: its files are private to the user whatever the umask says.
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut, where the platform can open directories."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
