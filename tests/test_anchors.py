"""Initialisation against the published rules written out, and the anchors file."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fda_fast.anchors import Anchors, init_anchors
from fda_fast.errors import InputError


class Layer(nn.Module):
    """Shapes of a transformer block: only the input-side matrices have rows of the width."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)


class Conv1D(nn.Module):
    """The GPT-2 layer under the name and with the attribute that transformers gives it."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def published_weight_init(layer, shape, seed):
    """The published rule, one row at a time."""
    generator = seeded(seed)
    rows = []
    for parameter in layer.parameters():
        if parameter.dim() == 2 and parameter.shape[1] == shape[-1]:
            rows.extend(row.detach().clone() for row in parameter)
    needed = torch.Size(shape[:-1]).numel()
    if len(rows) >= needed:
        order = torch.randperm(len(rows), generator=generator)[:needed]
        chosen = [rows[int(i)] for i in order]
    else:
        chosen, available = list(rows), len(rows)
        while len(chosen) < needed:
            i = int(torch.randint(0, available, (1,), generator=generator))
            j = int(torch.randint(0, available, (1,), generator=generator))
            chosen.append((rows[i] + rows[j]) / 2)
    return torch.stack(chosen).reshape(shape)


@pytest.mark.parametrize("shape", [(4, 5, 8), (32, 8), (16, 9, 8), (50, 8)])
def test_weight_rows_equal_the_published_rule_bit_for_bit(shape):
    torch.manual_seed(1)
    layer = Layer()
    anchors = init_anchors(layer, shape, generator=seeded(7))
    assert torch.equal(anchors, published_weight_init(layer, shape, 7))
    assert anchors.dtype == torch.float32
    assert not anchors.requires_grad


def test_token_first_layout_is_the_published_vision_order():
    layer = Layer()
    anchors = init_anchors(layer, (6, 9, 8), generator=seeded(7), layout="token_first")
    assert torch.equal(anchors.transpose(0, 1), published_weight_init(layer, (9, 6, 8), 7))
    assert anchors.is_contiguous()
    # 32 rows, 6 anchors: the first five tokens of every anchor are true weight rows.
    rows = torch.cat([layer.query.weight, layer.up.weight]).detach()
    assert torch.equal(anchors[:, :5].transpose(0, 1).reshape(30, 8), rows[:30])


def test_enough_rows_are_used_without_replacement():
    layer = Layer()
    rows = torch.cat([layer.query.weight, layer.up.weight]).detach()
    anchors = init_anchors(layer, (32, 8), generator=seeded())
    assert torch.equal(anchors.sort(dim=0).values, rows.sort(dim=0).values)
    assert not torch.equal(anchors, rows)


def test_conv1d_gives_its_columns():
    torch.manual_seed(0)
    block = nn.ModuleDict({"c_attn": Conv1D(24, 8), "c_proj": Conv1D(8, 32)})
    anchors = init_anchors(block, (24, 8), generator=seeded())
    columns = block["c_attn"].weight.detach().T
    assert torch.equal(anchors.sort(dim=0).values, columns.sort(dim=0).values)
    with pytest.raises(InputError, match="second dimension is 7"):
        init_anchors(block, (24, 7), generator=seeded())


def test_real_gpt2_block_gives_its_columns():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    block = GPT2Block(GPT2Config(n_embd=8, n_head=2), layer_idx=0)
    anchors = init_anchors(block, (8 * (3 + 1 + 4), 8), generator=seeded())
    used = [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc]
    columns = torch.cat([module.weight.detach().T for module in used])
    assert torch.equal(anchors.sort(dim=0).values, columns.sort(dim=0).values)


def test_gaussian_is_standard_normal_times_scale():
    anchors = init_anchors(Layer(), (64, 50, 8), "gaussian", scale=0.01, generator=seeded(3))
    assert torch.equal(anchors, torch.randn(64, 50, 8, generator=seeded(3)) * 0.01)
    again = init_anchors(Layer(), (64, 50, 8), "gaussian", scale=0.01, generator=seeded(3))
    assert torch.equal(anchors, again)
    transposed = init_anchors(
        Layer(), (4, 3, 8), "gaussian", generator=seeded(3), layout="token_first"
    )
    drawn = torch.randn(3, 4, 8, generator=seeded(3)) * 0.01
    assert torch.equal(transposed, drawn.transpose(0, 1))


def test_dtype_follows_the_layer_but_is_at_least_float32():
    assert init_anchors(Layer().double(), (3, 8)).dtype == torch.float64
    assert init_anchors(Layer().bfloat16(), (3, 8)).dtype == torch.float32
    assert init_anchors(Layer().double(), (3, 8), "gaussian").dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8,)}, "anchor shape"),
        ({"shape": (2, 0, 8)}, "anchor shape"),
        ({"shape": (2, 2, 2, 8)}, "anchor shape"),
        ({"shape": (2, 8), "scheme": "weight"}, "anchor scheme"),
        ({"shape": (2, 8), "scheme": "gaussian", "scale": 0.0}, "scale"),
        ({"shape": (2, 8), "scheme": "gaussian", "scale": float("nan")}, "scale"),
        ({"shape": (2, 8), "layout": "rows"}, "layout"),
        ({"shape": (2, 9)}, "weight rows"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        init_anchors(Layer(), **arguments)


def example(**changes):
    base = Anchors(
        torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) / 7,
        layer="encoder.layer.3",
        task="emotion \u00e9",
        settings={"steps": 3, "lr": 1e-2, "init": "weights"},
        cosines={"query.weight": 0.1 + 0.2, "key.bias": 0.0},
        loss=1 / 3,
        pretrained_sha256="a" * 64,
        expert_sha256="b" * 64,
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4)])
def test_file_round_trip(tmp_path, shape):
    anchors = example(tensor=torch.randn(shape, generator=seeded()))
    anchors.save(tmp_path / "a.safetensors")
    loaded = Anchors.load(tmp_path / "a.safetensors", shape=shape)
    assert torch.equal(loaded.tensor, anchors.tensor)
    for field in dataclasses.fields(Anchors)[1:]:
        assert getattr(loaded, field.name) == getattr(anchors, field.name)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_loaded_anchors_lie_in_memory_as_constructed_ones_do(tmp_path):
    """Products round by the alignment of what they read, and a merge goes on in the same bytes."""
    for length in range(8):
        path = tmp_path / f"{length}.safetensors"
        example(layer="x" * 8 * length).save(path)
        assert Anchors.load(path).tensor.data_ptr() % 64 == 0


def test_file_is_readable_by_safetensors_itself(tmp_path):
    example().save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["layer"] == "encoder.layer.3"
        assert json.loads(file.metadata()["settings"])["steps"] == 3
        assert torch.equal(file.get_tensor("anchors"), example().tensor)


def test_non_contiguous_anchors_are_saved_as_they_read(tmp_path):
    tensor = torch.randn(3, 2, 4, generator=seeded()).transpose(0, 1)
    example(tensor=tensor).save(tmp_path / "a.safetensors")
    assert torch.equal(Anchors.load(tmp_path / "a.safetensors").tensor, tensor)


def test_same_anchors_give_same_bytes_in_another_process(tmp_path):
    example().save(tmp_path / "a.safetensors")
    example(settings={"init": "weights", "lr": 1e-2, "steps": 3}).save(tmp_path / "b.safetensors")
    code = (
        "from fda_fast.anchors import Anchors; import sys;"
        "Anchors.load(sys.argv[1]).save(sys.argv[2])"
    )
    paths = [str(tmp_path / name) for name in ("a.safetensors", "c.safetensors")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 3
    assert len(digests) == 1


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    example().save(path)
    before = path.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        example(loss=2.0).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_unusable_files_are_named(tmp_path):
    good = tmp_path / "good.safetensors"
    example().save(good)
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        Anchors.load(tmp_path / "missing.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"cut\.safetensors is unreadable"):
        Anchors.load(cut)
    with pytest.raises(InputError, match=r"shape: expected \(9, 9\), got \(2, 3, 4\)"):
        Anchors.load(good, shape=(9, 9))
    other = tmp_path / "other.safetensors"
    save_file({"anchors": torch.ones(2, 3)}, other, {"format_version": "2"})
    with pytest.raises(InputError, match="format version: expected 1, got 2"):
        Anchors.load(other)
    save_file({"anchors": torch.ones(2, 3)}, other)
    with pytest.raises(InputError, match="format version: expected 1, got none"):
        Anchors.load(other)
    save_file({"anchors": torch.ones(2, 3)}, other, {"format_version": "1", "layer": "x"})
    with pytest.raises(InputError, match="lacks"):
        Anchors.load(other)
    with safe_open(good, framework="pt") as file:
        metadata = file.metadata()
    save_file({"anchors": torch.ones(2, 3).double()}, other, metadata)
    with pytest.raises(InputError, match="float32"):
        Anchors.load(other)
    save_file({"anchors": torch.ones(2, 3)}, other, {**metadata, "settings": "{"})
    with pytest.raises(InputError, match="damaged metadata"):
        Anchors.load(other)


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(InputError, match="float32"):
        example(tensor=torch.ones(2, 3, dtype=torch.float64)).save(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="settings"):
        example(settings={"x": object()}).save(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []
