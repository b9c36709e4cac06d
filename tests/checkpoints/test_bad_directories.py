"""Directories that lack files, lie about them or lead elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

INDEX = "model.safetensors.index.json"


def sharded(directory: Path) -> dict[str, str]:
    save_file({"a": torch.zeros(2)}, directory / "one.safetensors")
    save_file({"b": torch.zeros(3)}, directory / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_missing_path_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json.*model\.safetensors.*No such file"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="download it first"):
        Checkpoint.open("no-such-org/no-such-model")
    with pytest.raises(InputError):
        Checkpoint.open("a\0b")


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no weights.*an empty directory"):
        Checkpoint.open(tmp_path)


def test_directory_with_one_oddly_named_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"name it: .*weights\.safetensors"):
        Checkpoint.open(tmp_path)


def test_shards_without_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match="not their index"):
        Checkpoint.open(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of 2 files.*'two\.safetensors'"):
        Checkpoint.open(tmp_path)


def test_truncated_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / "two.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"two\.safetensors.*truncated"):
        Checkpoint.open(tmp_path)


def test_index_entry_the_shard_lacks(tmp_path: Path) -> None:
    write_index(tmp_path, sharded(tmp_path) | {"c": "one.safetensors"})
    with pytest.raises(InputError, match=r"tensor 'c' in one\.safetensors.*no such tensor"):
        Checkpoint.open(tmp_path)


def test_index_entry_in_the_wrong_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    with pytest.raises(InputError, match="does not fit its shards"):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"tensor 'a' .* in two files"):
        Checkpoint.open(tmp_path)


def test_index_leading_outside(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weight_map = sharded(model)
    secret = tmp_path / "secret.safetensors"
    save_file({"b": torch.ones(3)}, secret)
    for outside in ("../secret.safetensors", str(secret), "x/../../secret.safetensors"):
        write_index(model, weight_map | {"b": outside})
        with pytest.raises(InputError, match="points outside the directory"):
            Checkpoint.open(model)
    (model / "two.safetensors").unlink()
    (model / "two.safetensors").symlink_to(secret)
    write_index(model, weight_map)
    with pytest.raises(InputError, match="link to a file outside"):
        Checkpoint.open(model)


def test_single_file_linking_outside(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"b": torch.ones(3)}, tmp_path / "secret.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(InputError, match="link to a file outside"):
        Checkpoint.open(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX, "two.safetensors"])
def test_links_in_circles(tmp_path: Path, name: str) -> None:
    sharded(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "loop")
    (tmp_path / "loop").symlink_to(tmp_path / name)
    with pytest.raises(InputError, match=name):
        Checkpoint.open(tmp_path)


def test_path_itself_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="symbolic links"):
        Checkpoint.open(tmp_path / "a")


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {}, {"a": 3}, {"a": None}, {"a": ["one.safetensors"]}, {"a": ""}, {"a": "\x1b[2J"}],
)
def test_malformed_weight_map(tmp_path: Path, weight_map: object) -> None:
    sharded(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{", b"[" * 100_000])
def test_malformed_json(tmp_path: Path, name: str, content: bytes) -> None:
    sharded(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        Checkpoint.open(tmp_path)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="a regular file"):
        Checkpoint.open(tmp_path)  # and does not wait for a writer


def test_model_and_adapter_in_one_directory(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="both a model and an adapter"):
        Checkpoint.open(tmp_path)
