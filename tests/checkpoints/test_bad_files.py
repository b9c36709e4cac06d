"""Damaged, dangerous and unusable files: always InputError, naming the file and the reason."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError


def raw_safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "not json": (b"{nonsense", b"", "not valid JSON"),
    "not an object": ([1, 2], b"", "JSON object"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "deeply nested": (b"[" * 100_000, b"", "not valid JSON"),
    "a name twice": (b'{"a": {"x": 1}, "a": {"x": 1}}', b"", "'a' twice"),
    "entry not an object": ({"a": 3}, b"", "object for tensor 'a'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "dtype for tensor 'a'"),
    "unprintable name": ({"a\x1b[31m": entry()}, bytes(8), r"a\\x1b"),
    "empty name": ({"": entry()}, bytes(8), "printable"),
    "negative size": ({"a": entry(shape=[-2])}, bytes(8), "shape for tensor 'a'"),
    "fractional size": ({"a": entry(shape=[2.0])}, bytes(8), "shape for tensor 'a'"),
    "boolean size": ({"a": entry(shape=[True, 2])}, bytes(8), "shape for tensor 'a'"),
    "overflowing shape": ({"a": entry(shape=[2**40, 2**40])}, bytes(8), "shape for tensor 'a'"),
    "overflow behind a zero": ({"a": entry("F32", [0, 2**63, 2**63], [0, 0])}, b"", "shape"),
    "offsets reversed": ({"a": entry(offsets=[8, 0])}, bytes(8), "two offsets"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, bytes(8), "two offsets"),
    "offsets not those of the shape": ({"a": entry(shape=[3])}, bytes(8), "12 bytes .* got 8"),
    "beyond the file": ({"a": entry()}, bytes(4), "truncated"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "hole or overlap"),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "hole or overlap"),
    "trailing bytes": ({"a": entry()}, bytes(9), "not an intact"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_header(tmp_path: Path, case: str) -> None:
    header, data, message = HEADERS[case]
    path = raw_safetensors(tmp_path / "w.safetensors", header, data)
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.open(path, "expert x")
    assert "w.safetensors" in str(caught.value)
    assert "expert x" in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 10**9, 100, 0])
def test_bad_header_length(tmp_path: Path, length: int) -> None:
    path = raw_safetensors(tmp_path / "w.safetensors", b"{}", length=length)
    with pytest.raises(InputError, match=r"safetensors|JSON"):
        Checkpoint.open(path)


@pytest.mark.parametrize("content", [b"", b"\x01\x02", b"{}" * 40, bytes(8)])
def test_file_that_is_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"w\.safetensors"):
        Checkpoint.open(path)


def test_empty_checkpoint(tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "w.safetensors", {"__metadata__": {"format": "pt"}})
    with pytest.raises(InputError, match="is empty"):
        Checkpoint.open(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U32", "F4", "I4", "C64"])
def test_unsupported_dtype(tmp_path: Path, dtype: str) -> None:
    path = raw_safetensors(tmp_path / "w.safetensors", {"layer.weight": entry(dtype)}, bytes(8))
    with pytest.raises(InputError, match=rf"'layer.weight'.*got {dtype}.*unquantised"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("l.weight", torch.int8), ("l.qweight", torch.int32), ("l.weight.SCB", torch.float32)],
)
def test_quantised_weights(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    save_file({name: torch.zeros(4, 4).to(dtype)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=f"'{name}'.*quantised"):
        Checkpoint.open(tmp_path / "w.safetensors")


def test_quantised_config(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="'gptq'"):
        Checkpoint.open(tmp_path)


class Evil:
    """Runs a program when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("writer", ["zip", "old", "plain"])
@pytest.mark.parametrize("nested", [False, True])
def test_pickle_with_code_is_not_run(tmp_path: Path, writer: str, nested: bool) -> None:
    witness, path = tmp_path / "witness", tmp_path / "model.bin"
    content = {"a": Evil(witness), "b": torch.zeros(2)} if nested else Evil(witness)
    if writer == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(InputError, match=r"needs code.*(posix|nt|os)\.system"):
        Checkpoint.open(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "got a list"),
        (torch.zeros(3), "got a Tensor"),
        ({}, "no tensor"),
        ({"epoch": 3}, "no tensor"),
        ({"a": torch.zeros(2), "b": 3}, "int under 'b'"),
        ({1: torch.zeros(2)}, "the key 1"),
        ({"a": torch.zeros(2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a.weight": torch.zeros(2, dtype=torch.int8)}, "quantised"),
    ],
)
def test_pickle_that_is_no_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(InputError, match=message):
        Checkpoint.open(tmp_path / "model.bin")


def test_compressed_zip_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as source,
        zipfile.ZipFile(tmp_path / "model.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))
    with pytest.raises(InputError, match="compressed"):
        Checkpoint.open(tmp_path / "model.bin")


def test_truncated_pickle(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for zipped in (True, False):
        torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=zipped)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(InputError, match="not an intact pickled checkpoint"):
            Checkpoint.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + bytes(64), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>Not found", "web page"),
        (b"merge_method: fda\n", "a text file"),
        (b"", "got an empty file"),
        ("größe: ".encode() * 9 + b"\n", "a text file"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(path)
