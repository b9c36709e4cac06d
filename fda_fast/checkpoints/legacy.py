"""Pickled checkpoints (.bin, .pt, .pth): their tensors by name, without executing what is in them.

State dicts, and whole modules: the tree of records that ``pickles`` makes of a module gives the
state dict the module would have had. Tensors are read as lazily as from a safetensors file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fda_fast.checkpoints.pickles.containers import RAW_PREFIX, ZIP_MAGIC
from fda_fast.checkpoints.pickles.load import explained, load_pickle
from fda_fast.checkpoints.pickles.values import MAX_NAME, PickledTensor, Record, describe
from fda_fast.checkpoints.tensorfile import TensorFile, TensorInfo, check_readable
from fda_fast.errors import InputError

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SUFFIXES = (".safetensors", *_PICKLES)


def read_pickle(file: TensorFile) -> tuple[dict[str, TensorInfo], Record | None]:
    """Tensors of a pickled state dict or module.

    Returns:
        ({name: where it lies}, the module as a record, None for a state dict).

    Raises:
        InputError: code in the pickle (names the global), neither a state dict nor a module,
            damaged, or a dtype that cannot be merged.

    Cost: reads the pickle, no tensor.
    """
    loaded = _unwrap(load_pickle(file))
    module = loaded if isinstance(loaded, Record) and loaded.is_module else None
    with explained(file):
        tensors = _state_dict(file, loaded) if module is None else module.state_dict()
        if not tensors:
            raise _not_state_dict(file, "no tensor at all")
        infos = {}
        for name, tensor in tensors.items():
            if not name or len(name) > MAX_NAME or not name.isprintable():
                raise _not_state_dict(file, f"the key {name!r:.80}")
            check_readable(name, tensor.dtype, str(tensor.dtype), file.role)
            infos[name] = tensor.info(file)
    return infos, module


def _unwrap(loaded: Any) -> Any:
    """What is in the one wrapper that trainers put around a state dict or module."""
    for key in _WRAPPERS:
        inner = loaded.get(key) if isinstance(loaded, dict) else None
        if isinstance(inner, dict) or (isinstance(inner, Record) and inner.is_module):
            return inner
    return loaded


def _state_dict(file: TensorFile, loaded: Any) -> dict[str, PickledTensor]:
    if not isinstance(loaded, Mapping):
        raise _not_state_dict(file, describe(loaded))
    if not any(isinstance(value, PickledTensor) for value in loaded.values()):
        raise _not_state_dict(file, "no tensor at all")
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise _not_state_dict(file, f"the key {name!r:.80}")
        if not isinstance(value, PickledTensor):
            raise _not_state_dict(file, f"{describe(value)} under {name!r:.80}")
    return dict(loaded)


def _not_state_dict(file: TensorFile, what: str) -> InputError:
    return InputError(
        f"file {file.path} of the {file.role} holds no state dict and no module",
        expected="a dict of names and tensors, or an nn.Module",
        got=what,
        fix="Save model.state_dict(), or use model.save_pretrained(directory)",
    )


def file_kind(path: Path, first: bytes) -> str:
    """What a weight file is by its first bytes: "pickle", "safetensors", or what it is instead."""
    if first.startswith(ZIP_MAGIC) or first.startswith(RAW_PREFIX):
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
    if not first:
        return "an empty file"
    # A pickle that torch.save did not write still starts with its protocol.
    if path.suffix in _PICKLES and first[:1] == b"\x80":
        return "pickle"
    if _is_text(first):
        return "a text file"
    # The first four bytes of eight hold every length of a header that there is.
    if path.suffix not in _SUFFIXES and any(first[4:8]):
        return "a file of another kind"
    return "safetensors"


def _is_text(first: bytes) -> bool:
    """Whether a file begins as text does; the length in front of a safetensors header has zeros."""
    try:
        text = first.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(first) - 3:  # a character may be cut off at the end
            return False
        text = first[: error.start].decode("utf-8")
    return bool(text) and all(c.isprintable() or c in "\n\r\t" for c in text)
