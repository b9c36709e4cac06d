"""Pickled state dicts (.bin, .pt, .pth), read without executing what is in them.

Only ``torch.load(weights_only=True)`` ever sees the pickle, with no fallback of any kind. The
zip-based format (torch 1.6 and later) is loaded without its storages, which tells where every
tensor lies in the file: from then on it is read as lazily as a safetensors file. The format of
before 2020 has no such positions and is read whole.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fda_fast.checkpoints.tensorfile import TensorFile, TensorInfo, check_readable
from fda_fast.errors import InputError

# torch.save before 1.6 starts with this pickled magic number.
OLD_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
ZIP_MAGIC = b"PK\x03\x04"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|global ([\w.]+)|class ([\w.]+)|function ([\w.]+)")


def read_pickle(file: TensorFile) -> tuple[dict[str, TensorInfo], dict[str, torch.Tensor]]:
    """Tensors of a pickled state dict.

    Returns:
        ({name: where it lies}, {name: tensor}); the second is empty for the zip format and holds
        every tensor, in memory, for the format of torch before 1.6.

    Raises:
        InputError: code in the pickle (names the global), not a state dict, damaged, or a dtype
            that cannot be merged.
    """
    if file.read_bytes(0, len(ZIP_MAGIC)) == ZIP_MAGIC:
        ranges = _stored_ranges(file)
        tensors = _state_dict(file, _load_positions(file))
        return {name: _locate(file, name, t, ranges) for name, t in tensors.items()}, {}
    tensors = _state_dict(file, _load(file, "cpu"))
    infos = {}
    for name, tensor in tensors.items():
        check_readable(name, tensor.dtype, str(tensor.dtype), file.role)
        infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, file.path, tensor.nbytes)
    return infos, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _load(file: TensorFile, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            # About the pickle protocol: what cannot be read is refused below anyway.
            warnings.simplefilter("ignore")
            return torch.load(file.path, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise _refusal(file, str(error)) from error


def _load_positions(file: TensorFile) -> Any:
    """The pickle with every tensor on the meta device, its storage knowing its place in the file.

    torch records that place for fake tensors since 2.5 and for map_location="meta" later.
    """
    loaded = _load(file, "meta")
    if all(_position(t) is not None for t in _tensors(loaded)):
        return loaded
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return _load(file, "cpu")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for entry in value.values() for t in _tensors(entry)]
    return []


def _position(tensor: torch.Tensor) -> int | None:
    try:
        return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
        return None


def _state_dict(file: TensorFile, loaded: Any) -> dict[str, torch.Tensor]:
    """The name -> tensor mapping, out of the one wrapper that trainers put around it."""
    if isinstance(loaded, Mapping) and not _tensors(dict(enumerate(loaded.values()))):
        raise _not_state_dict(file, "no tensor at all")
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise _not_state_dict(file, type(loaded).__name__)
    for name, value in loaded.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise _not_state_dict(file, f"the key {name!r:.80}")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            kind = value.layout if isinstance(value, torch.Tensor) else type(value).__name__
            raise _not_state_dict(file, f"a {kind} under {name!r}")
    return dict(loaded)


def _stored_ranges(file: TensorFile) -> dict[int, int]:
    """{first byte: size} of the uncompressed entries of the zip: where storages may lie."""
    ranges = {}
    try:
        with zipfile.ZipFile(file.path) as archive, open(file.path, "rb") as stream:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise _damaged(file, f"entry {entry.filename!r:.80} is compressed")
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise _damaged(file, "big-endian numbers")
                stream.seek(entry.header_offset + 26)
                name, extra = stream.read(2), stream.read(2)
                begin = entry.header_offset + 30
                begin += int.from_bytes(name, "little") + int.from_bytes(extra, "little")
                if entry.file_size and begin + entry.file_size > file.size:
                    raise _damaged(file, f"entry {entry.filename!r:.80} beyond its end")
                ranges[begin] = entry.file_size
    except InputError:
        raise
    except Exception as error:  # zipfile raises half a dozen kinds on damaged archives
        raise _damaged(file, str(error)[:200]) from error
    return ranges


def _locate(
    file: TensorFile, name: str, tensor: torch.Tensor, ranges: dict[int, int]
) -> TensorInfo:
    check_readable(name, tensor.dtype, str(tensor.dtype), file.role)
    size = tensor.dtype.itemsize
    start = _position(tensor)
    nbytes = tensor.numel() * size
    if nbytes == 0:
        return TensorInfo(tuple(tensor.shape), tensor.dtype, file.path, 0)
    if start not in ranges:
        raise _damaged(file, f"tensor {name!r} at byte {start}, where no entry begins")
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    offset = start + int(tensor.storage_offset()) * size
    info = TensorInfo(tuple(tensor.shape), tensor.dtype, file.path, nbytes, offset, stride)
    if info.offset + info.span > start + ranges[start]:
        raise _damaged(file, f"tensor {name!r} beyond its storage of {ranges[start]} bytes")
    return info


def _refusal(file: TensorFile, message: str) -> InputError:
    """A torch.load failure, as one line: the global it refused, or what is broken."""
    found = _GLOBAL.search(message)
    if "Weights only load failed" not in message:
        return _damaged(file, message.strip().split("\n")[0][:200])
    if found is None:
        return _damaged(file, "a pickle that torch.save did not write")
    name = next(group for group in found.groups() if group)
    return InputError(
        f"file {file.path} of the {file.role} is a pickle that needs code to be loaded",
        expected="a state dict: names and tensors, nothing else",
        got=f"a reference to {name}",
        fix="Loading it could run any program. Where it was made, save model.state_dict() or, "
        "better, model.save_pretrained(directory) and use that",
    )


def _damaged(file: TensorFile, what: str) -> InputError:
    return InputError(
        f"file {file.path} of the {file.role} is not an intact pickled state dict",
        got=what,
        fix="Download or copy it again, or save it as safetensors",
    )


def _not_state_dict(file: TensorFile, what: str) -> InputError:
    return InputError(
        f"file {file.path} of the {file.role} holds no state dict",
        expected="a dict of names and tensors",
        got=what,
        fix="Save model.state_dict(), or use model.save_pretrained(directory)",
    )


def file_kind(path: Path, first: bytes) -> str:
    """What a weight file is by its first bytes: "pickle", "safetensors", or what it is instead."""
    if first.startswith(ZIP_MAGIC) or first.startswith(OLD_MAGIC):
        return "pickle"
    for magic, kind in (
        (b"GGUF", "a GGUF file (quantised, for llama.cpp)"),
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run: git lfs pull)"),
        (b"\x89HDF", "an HDF5 file (Keras)"),
        (b"<!DOCTYPE", "a web page"),
        (b"<!doctype", "a web page"),
        (b"<html", "a web page"),
        (b"<?xml", "a web page"),
    ):
        if first.startswith(magic):
            return kind
    # A pickle that torch.save did not write still starts with its protocol.
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt") and first[:1] == b"\x80":
        return "pickle"
    return "safetensors"
