"""Random damage: opening and reading either works or raises InputError, and always ends."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

MUTATIONS = 200


def open_and_read(path: Path) -> bool:
    """Whether the checkpoint could be used. Any exception but InputError fails the test."""
    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.read(checkpoint.names)
    except InputError as error:
        assert str(error).isprintable(), repr(str(error))
        return False
    return True


def mutate(content: bytes, random: random.Random) -> bytes:
    """One to four edits: bytes flipped, cut out, doubled, inserted, or the end cut off."""
    data = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(max(1, len(data)))
        kind = random.randrange(5)
        if kind == 0 and data:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[at : at + random.randint(1, 16)]
        elif kind == 2:
            data[at:at] = data[at : at + random.randint(1, 16)]
        elif kind == 3:
            data[at:at] = random.randbytes(random.randint(1, 8))
        else:
            del data[random.randrange(len(data) // 2, len(data) + 1) :]
    return bytes(data)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tensors = {"a.weight": torch.ones(3, 2), "b": torch.zeros(2).bfloat16(), "c": torch.tensor(1)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_mutated_safetensors(small: Path) -> None:
    path, random_ = small / "model.safetensors", random.Random(1)
    content = path.read_bytes()
    used = 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(content, random_))
        used += open_and_read(path)
    assert used < MUTATIONS / 2


def test_mutated_header_only(small: Path) -> None:
    # Edits of the JSON alone, with the length kept right: the deeper checks are reached.
    path, random_ = small / "model.safetensors", random.Random(2)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(MUTATIONS):
        header = mutate(content[8 : 8 + length], random_)
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        open_and_read(path)


def test_mutated_index_and_config(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    good = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    random_ = random.Random(3)
    for _ in range(MUTATIONS):
        index.write_bytes(mutate(good, random_))
        (tmp_path / "config.json").write_bytes(mutate(b'{"model_type": "bert"}', random_))
        open_and_read(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_mutated_pickle(tmp_path: Path, zipped: bool) -> None:
    path, random_ = tmp_path / "model.bin", random.Random(4)
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(2).bfloat16()}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(content, random_))
        open_and_read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "", "F99"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-8, 64), min_size=2, max_size=2) | JSON,
    },
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=3), data=st.binary())
def test_any_json_as_header(tmp_path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    open_and_read(path)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(weight_map=JSON | st.dictionaries(st.text(max_size=6), st.text(max_size=12), max_size=3))
def test_any_json_as_index(tmp_path: Path, weight_map: object) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    open_and_read(tmp_path)
