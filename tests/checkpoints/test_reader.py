"""What Checkpoint.open accepts, and that it reads exactly what was written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fda_fast.checkpoints.hashing import hash_tensor, hash_tensors
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c.scalar": torch.tensor(2.5, dtype=torch.float64),
    "d.empty": torch.empty(0, 3),
    "e.half": torch.ones(7, dtype=torch.float16),
    "f.ids": torch.arange(6).reshape(1, 6),
    "g.mask": torch.tensor([True, False, True]),
}
NAMES = list(TENSORS)


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(got) == list(expected) and all(
        got[n].dtype == expected[n].dtype and torch.equal(got[n], expected[n]) for n in expected
    )


def write_shards(directory: Path, groups: list[list[str]]) -> dict[str, str]:
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, names in enumerate(groups, 1):
        shard = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        save_file({n: TENSORS[n] for n in names}, directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_single_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path)
    checkpoint = Checkpoint.open(path)
    assert set(checkpoint.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        info = checkpoint.names[name]
        assert (info.shape, info.dtype, info.file, info.nbytes, info.numel) == (
            tuple(tensor.shape),
            tensor.dtype,
            path,
            tensor.nbytes,
            tensor.numel(),
        )
    assert same(checkpoint.read(NAMES), TENSORS)
    assert list(checkpoint.read(["e.half", "a.weight"])) == ["e.half", "a.weight"]
    assert (checkpoint.config, checkpoint.directory, checkpoint.adapter) == (None, None, None)


def test_sharded_directory(tmp_path: Path) -> None:
    write_shards(tmp_path, [NAMES[:3], NAMES[3:]])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    checkpoint = Checkpoint.open(tmp_path)
    assert same(checkpoint.read(NAMES), TENSORS)
    assert checkpoint.config == {"model_type": "bert"}
    assert len({info.file for info in checkpoint.names.values()}) == 2


def test_shard_tensor_missing_from_the_index_is_said(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, [NAMES[:3], NAMES[3:]])
    del weight_map["e.half"]
    write_index(tmp_path, weight_map)
    checkpoint = Checkpoint.open(tmp_path)
    assert "e.half" not in checkpoint.names
    assert "e.half" in checkpoint.notes[0]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickled_state_dict(tmp_path: Path, zipped: bool, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint.open(path, "expert x")
    assert same(checkpoint.read(NAMES), TENSORS)
    assert all(info.offset > 0 for info in checkpoint.names.values() if info.nbytes)
    assert checkpoint.notes == []


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_views_strides_and_ties(tmp_path: Path, zipped: bool) -> None:
    weight = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    tensors = {
        "embed": weight,
        "head": weight,
        "transposed": weight.t(),
        "block": weight[1:4, 1:3],
        "rows": weight[2:],
        "expanded": weight[:1].expand(5, 4),
    }
    path = tmp_path / "model.pt"
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint.open(path)
    assert same(checkpoint.read(list(tensors)), tensors)
    assert checkpoint.aliases == {"head": "embed"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickle_is_read_lazily(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.bin"
    big = torch.zeros(1 << 20)
    torch.save({"small": torch.ones(3), "big": big}, path, _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint.open(path)
    # Overwrite "big" in place, keeping the stamp: reading "small" must not have touched it.
    before = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(checkpoint.names["big"].offset)
        stream.write(b"\x01" * 16)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checkpoint.read(["small"])["small"].tolist() == [1.0, 1.0, 1.0]
    assert checkpoint.read(["big"])["big"][:4].view(torch.uint8).tolist() == [1] * 16


def test_pytorch_model_bin_with_index(tmp_path: Path) -> None:
    torch.save({n: TENSORS[n] for n in NAMES[:2]}, tmp_path / "one.bin")
    torch.save({n: TENSORS[n] for n in NAMES[2:]}, tmp_path / "two.bin")
    weight_map = dict.fromkeys(NAMES[:2], "one.bin") | dict.fromkeys(NAMES[2:], "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(Checkpoint.open(tmp_path).read(NAMES), TENSORS)


def test_safetensors_preferred_over_pickle(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04 anything")
    assert Checkpoint.open(tmp_path).read(["a"])["a"].item() == 1.0


def test_hub_cache_layout_of_links(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(TENSORS, cache / "blobs" / "0123")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    assert same(Checkpoint.open(snapshot).read(NAMES), TENSORS)


def test_at_hand_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path)
    mine = torch.full((3, 4), 9.0)
    got = Checkpoint.open(path).read(["e.half", "a.weight"], {"a.weight": mine})
    assert list(got) == ["e.half", "a.weight"]
    assert got["a.weight"] is mine


def test_unknown_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path)
    with pytest.raises(InputError, match=r"expert x .* has no tensor 'nope'"):
        Checkpoint.open(path, "expert x").read(["nope"])


@pytest.mark.parametrize("how", ["truncate", "replace", "touch", "delete"])
def test_file_that_changes_while_used(tmp_path: Path, how: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path)
    checkpoint = Checkpoint.open(path)
    if how == "truncate":
        os.truncate(path, path.stat().st_size - 5)
    elif how == "replace":
        shutil.copyfile(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    elif how == "touch":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"changed while|cannot be read"):
        checkpoint.read(["a.weight"])


def test_hashes_depend_on_dtype_shape_bytes_and_names_alone() -> None:
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert hash_tensor(x) == hash_tensor(x.t().contiguous().t())
    others = [x.reshape(3, 2), x.double(), x + 1, x.view(torch.int32)]
    assert len({hash_tensor(t) for t in (x, *others)}) == 5
    assert hash_tensor(torch.empty(0, 2)) != hash_tensor(torch.empty(2, 0))
    y = torch.ones(3).bfloat16()
    assert hash_tensors({"x": x, "y": y}) == hash_tensors({"y": y, "x": x})
    assert hash_tensors({"x": x, "y": y}) != hash_tensors({"x": y, "y": x})
    assert hash_tensors({"x": x}) != hash_tensors({"x": x, "y": torch.empty(0)})
