"""Pickled files as torch, Python and numpy write them: the same tensors as torch.load gives."""

from __future__ import annotations

import copy
import io
import json
import lzma
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load, load_file
from torch import nn

from fda_fast import merge
from fda_fast.checkpoints.align import match_expert
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.openclip import (
    ImageEncoder,
    QuickGELU,
    ResidualAttentionBlock,
    published_preset,
)
from fda_fast.checkpoints.pickles import PickledTensor, Record, Reference, load_pickle, read_npy
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.tensorfile import TensorFile
from fda_fast.errors import InputError
from fda_fast.layers.recognise import recognise
from fda_fast.testing import assert_no_worse_than_torch

DATA = Path(__file__).parent / "data"
ENCODERS = ("image_encoder.pt", "image_encoder_old.pt", "image_encoder.pkl")


def save_zip(value: Any, path: Path) -> None:
    torch.save(value, path)


def save_old(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_plain(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


FORMATS: dict[str, Callable[[Any, Path], None]] = {
    "zip": save_zip,
    "before torch 1.6": save_old,
    "pickle.dump": save_plain,
}


class Block(nn.Module):
    """A module with every kind of state that modules have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.convolution = nn.Conv2d(2, 3, 2, bias=False)
        self.recurrent = nn.LSTM(3, 2, num_layers=2)
        self.listed = nn.ParameterList([torch.ones(2), nn.Parameter(torch.zeros(1, 2))])
        self.mapped = nn.ParameterDict({"a": nn.Parameter(torch.arange(3.0))})
        self.halves = nn.ModuleDict({"low": nn.Linear(2, 3).half(), "brain": nn.Linear(2, 2)})
        self.halves["brain"].bfloat16()
        self.act = nn.GELU(approximate="tanh")
        self.function = torch.nn.functional.gelu
        self.missing = nn.Identity()
        self.register_parameter("none", None)
        self.register_buffer("kept", torch.arange(6).reshape(2, 3).t())
        self.register_buffer("transient", torch.ones(5), persistent=False)
        self.tied = self.attention.out_proj
        self.device, self.size, self.options = torch.device("cpu"), torch.Size([2]), {"a": {1, 2}}
        self.dtype = torch.float32


# Pickled by name, from a library known here, that must not be needed to read it.
Block.__module__, Block.__qualname__ = "open_clip.made_up", "Block"


@pytest.fixture
def made_up_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    for name in ("open_clip", "open_clip.made_up"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["open_clip.made_up"], "Block", Block, raising=False)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return checkpoint.read(checkpoint.names)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("form", FORMATS)
def test_module_gives_its_state_dict(tmp_path: Path, made_up_library: None, form: str) -> None:
    module = Block()
    FORMATS[form](module, tmp_path / "module.pt")
    assert_same(read_all(tmp_path / "module.pt"), dict(module.state_dict()))


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_of_every_kind(tmp_path: Path, form: str) -> None:
    whole = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    tensors = {
        "whole": whole,
        "view": whole[1:, ::2, 1:4],
        "permuted": whole.permute(2, 0, 1),
        "expanded": whole[:1, :1].expand(2, 3, 5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "grad": torch.ones(2, requires_grad=True),
        "bool": torch.tensor([True, False]),
        **{
            str(dtype): torch.tensor([0, 1, 100]).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16)
        },
    }
    FORMATS[form](OrderedDict(tensors), tmp_path / "tensors.pt")
    assert_same(read_all(tmp_path / "tensors.pt"), {n: t.detach() for n, t in tensors.items()})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_protocols(tmp_path: Path, protocol: int) -> None:
    value = {
        "text": ["", "é\n", "x" * 300],
        "numbers": (0, -1, 255, 70000, -(2**40), 2**70, 1.5, True, None),
        "sets": [{1, 2}, frozenset(("a",))],
        "ordered": OrderedDict(a=1),
        "shared": [[1]] * 2,
        "empty": [(), [], {}, set()],
    }
    path = tmp_path / "value.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    got = load_pickle(TensorFile(path, "test"))
    assert got == value
    assert got["shared"][0] is got["shared"][1]


def test_torch_protocols(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    module = nn.Linear(2, 3)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        torch.save(module, path, pickle_protocol=protocol)
        assert_same(read_all(path), dict(module.state_dict()))


def test_wrappers_around_modules(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    torch.save({"epoch": 3, "model": module}, tmp_path / "last.ckpt")
    assert_same(read_all(tmp_path / "last.ckpt"), dict(module.state_dict()))


def test_parameters_replaced_by_tensors(tmp_path: Path) -> None:
    # As the published adaptation saves what it refined by coefficients.
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    weight = module[0].weight * 2
    del module[0].weight
    module[0].weight = weight
    torch.save(module, tmp_path / "merged_model_by_ta.pt")
    assert "0.weight" not in module.state_dict()
    got = read_all(tmp_path / "merged_model_by_ta.pt")
    assert torch.equal(got.pop("0.weight"), weight)
    assert_same(got, dict(module.state_dict()))


def test_zip_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Above 4 GB the directory keeps sizes and positions elsewhere; here from 100 bytes on.
    tensors = {"a": torch.arange(500.0), "b": torch.ones(300, dtype=torch.int64)}
    torch.save(tensors, tmp_path / "small.pt")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    with (
        zipfile.ZipFile(tmp_path / "small.pt") as source,
        zipfile.ZipFile(tmp_path / "large.pt", "w") as target,
    ):
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))
    assert b"PK\x06\x06" in (tmp_path / "large.pt").read_bytes()
    assert_same(read_all(tmp_path / "large.pt"), tensors)


def test_classification_head(tmp_path: Path) -> None:
    head = nn.Linear(3, 2)
    head.normalize = True
    torch.save(head, tmp_path / "head_MNIST.pt")
    checkpoint = Checkpoint.open(tmp_path / "head_MNIST.pt")
    assert list(checkpoint.names) == ["weight", "bias"]
    (record,) = checkpoint.modules.values()
    assert record.kind == "Linear"
    assert record.get("normalize") is True


# open_clip 2.0.2's own pickles (data/make_image_encoder.py).


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image_encoder.pt, .pkl and _old.pt, unpacked."""
    folder = tmp_path_factory.mktemp("encoders")
    for name in ENCODERS:
        (folder / name).write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    return folder


@pytest.fixture(scope="session")
def published() -> dict[str, torch.Tensor]:
    """The encoder's state dict and a block's input and output, as open_clip computed them."""
    return load(lzma.decompress((DATA / "image_encoder.safetensors.xz").read_bytes()))


@pytest.mark.parametrize("name", ENCODERS)
def test_image_encoder(encoders: Path, published: dict[str, torch.Tensor], name: str) -> None:
    prefix = "state_dict."
    expected = {n.removeprefix(prefix): t for n, t in published.items() if n.startswith(prefix)}
    got = read_all(encoders / name)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], t) for n, t in expected.items())


@pytest.mark.parametrize("name", ENCODERS)
def test_image_encoder_as_records(encoders: Path, name: str) -> None:
    encoder = load_pickle(TensorFile(encoders / name, "test"))
    assert isinstance(encoder, Record)
    assert encoder.name == "src.modeling.ImageEncoder"
    steps = encoder.get("val_preprocess").get("transforms")
    kinds = [step.kind if isinstance(step, Record) else step for step in steps]
    assert kinds == [
        *("Resize", "CenterCrop"),
        Reference("open_clip.transform._convert_to_rgb"),
        *("ToTensor", "Normalize"),
    ]
    assert steps[0].get("interpolation").args == ("bicubic",)
    weight = encoder.submodule("model.visual.transformer.resblocks.0.mlp.c_fc").get("weight")
    assert isinstance(weight, PickledTensor)
    assert weight.is_parameter


@pytest.mark.parametrize("name", ENCODERS)
def test_image_blocks(encoders: Path, published: dict[str, torch.Tensor], name: str) -> None:
    base = Checkpoint.open(encoders / name)
    layout = ModelLayout.from_checkpoint(base)
    assert [spec.name for spec in layout.layers] == [
        f"visual.transformer.resblocks.{i}" for i in range(2)
    ]
    spec = layout.layers[1]
    tensors = base.read(spec.tensors.values())
    block = layout.build(spec, {k: tensors[n] for k, n in spec.tensors.items()})
    with torch.no_grad():
        out = block(published["block.x"])
        gold = copy.deepcopy(block).double()(published["block.x"].double())
    # The published values are of another processor, whose last bits this one need not give.
    assert_no_worse_than_torch(out, gold, published["block.y"])
    assert recognise(block).family == "pre-norm block"
    # Everything that is no image block stays as it is.
    assert len(layout.outside) == len(base.names) - 2 * 12


def finetuned(source: Path, target: Path, seed: int) -> Path:
    """A fine-tune of a pickled encoder: its bytes with other values in the image blocks."""
    target.write_bytes(source.read_bytes())
    checkpoint = Checkpoint.open(source)
    generator = torch.Generator().manual_seed(seed)
    with open(target, "r+b") as stream:
        for name, info in checkpoint.names.items():
            if "visual" in name:
                tensor = checkpoint.read([name])[name]
                tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
                assert info.stride is None
                stream.seek(info.offset)
                stream.write(tensor.numpy().tobytes())
    return target


def test_merge_of_image_encoders(encoders: Path, tmp_path: Path) -> None:
    base = encoders / "image_encoder.pt"
    experts = {
        "MNIST": finetuned(base, tmp_path / "one.pt", 1),
        "DTD": finetuned(encoders / "image_encoder_old.pt", tmp_path / "two.pt", 2),
    }
    # TSV's code and others keep state dicts.
    torch.save(read_all(finetuned(base, tmp_path / "x.pt", 3)), tmp_path / "nonlinear_finetuned.pt")
    experts["Cars"] = tmp_path / "nonlinear_finetuned.pt"
    settings: dict[str, Any] = {"steps": 2, "epochs": 1, "anchors": 3, "tokens": 4}
    settings["precision"] = "fp32"  # else a note on some processors that bf16 would be faster
    report = merge(base, experts, tmp_path / "out", progress=False, **settings)
    assert report.notes == []
    merged, pretrained = load_file(tmp_path / "out/model.safetensors"), read_all(base)
    assert merged.keys() == pretrained.keys()
    changed = {n for n, t in pretrained.items() if not torch.equal(t, merged[n])}
    assert changed == {n for n in pretrained if "resblocks" in n}
    assert not (tmp_path / "out/config.json").exists()


def test_state_dicts_without_the_encoder_around(encoders: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(encoders / "image_encoder.pt")
    layout = ModelLayout.from_checkpoint(base)
    for prefix in ("", "image_encoder.model."):
        tensors = {n.replace("model.", prefix, 1): t for n, t in base.read(base.names).items()}
        torch.save(tensors, tmp_path / "expert.pt")
        view = match_expert(base, Checkpoint.open(tmp_path / "expert.pt", "expert"), layout)
        assert view.unchanged == []


def test_state_dict_as_base_is_explained(encoders: Path, tmp_path: Path) -> None:
    torch.save(read_all(encoders / "image_encoder.pt"), tmp_path / "base.pt")
    with pytest.raises(InputError, match=r"state dict of an open_clip encoder.*Heads"):
        ModelLayout.from_checkpoint(Checkpoint.open(tmp_path / "base.pt"))


def test_other_modules_are_not_guessed(tmp_path: Path, made_up_library: None) -> None:
    torch.save(Block(), tmp_path / "module.pt")
    base = Checkpoint.open(tmp_path / "module.pt")
    with pytest.raises(InputError, match=r"open_clip\.made_up\.Block.*image encoder"):
        ModelLayout.from_checkpoint(base)


@pytest.mark.parametrize(
    ("tokens", "width", "blocks", "preset"),
    [
        (50, 768, 12, "vit-b-32"),
        (197, 768, 12, "vit-b-16"),
        (257, 1024, 24, "vit-l-14"),
        (50, 768, 11, None),
    ],
)
def test_published_encoders_take_their_preset(
    tokens: int, width: int, blocks: int, preset: str | None
) -> None:
    with torch.device("meta"):
        encoder = ImageEncoder()
        encoder.visual = nn.Module()
        encoder.visual.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        encoder.visual.transformer = nn.Module()
        encoder.visual.transformer.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, 4 * width, width // 64, QuickGELU())
            for _ in range(blocks)
        )
    assert published_preset(encoder) == preset


# Models of transformers: whole, and split as the published language-model code does.


@pytest.mark.parametrize("name", ["llama", "roberta", "clip"])
def test_whole_model_of_transformers(
    family: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = family(name)
    with open(folder / "config.json") as stream:
        kind = json.load(stream)["architectures"][0]
    torch.save(getattr(hf, kind).from_pretrained(folder), tmp_path / "model.pt")
    pickled = Checkpoint.open(tmp_path / "model.pt")
    ours = ModelLayout.from_checkpoint(pickled)
    theirs = ModelLayout.from_checkpoint(Checkpoint.open(folder))
    assert [s.name for s in ours.layers] == [s.name for s in theirs.layers]
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.shapes == other.shapes


def split(folder: Path, target: Path) -> Path:
    """A folder as split_model.py writes it inside a model's folder."""
    model = hf.LlamaForCausalLM.from_pretrained(folder)
    target.mkdir()
    parts = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm}
    parts |= {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    parts |= {"lm_head": model.lm_head}
    index = {name: name.replace(".", "_").replace("layers", "layer") + ".pt" for name in parts}
    for name, part in parts.items():
        torch.save(part, target / index[name])
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def test_split_folder(
    family: Callable[[str], Path], expert: Callable[..., Path], tmp_path: Path
) -> None:
    one = expert(family("llama"), name="one")
    (one / "tokenizer.json").write_text("{}")
    base = split(one, one / "split")
    assert read_all(base).keys() == read_all(one).keys()
    assert all(torch.equal(t, read_all(one)[n]) for n, t in read_all(base).items())
    two = expert(family("llama"), lambda t: {n: v + 0.01 for n, v in t.items()}, name="two")
    experts = [split(two, two / "split"), family("llama")]
    settings: dict[str, Any] = {"steps": 2, "epochs": 1, "anchors": 4}
    merge(base, experts, tmp_path / "out", progress=False, **settings)
    hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "../x.pt"}, "outside"),
        ({"a": "one.pt", "b": "one.pt"}, "one file for each"),
        ({"a": "none.pt"}, "none.pt"),
        ({"a": 3}, "file names"),
        ({}, "modules and files"),
    ],
)
def test_bad_split_index(tmp_path: Path, index: dict, message: str) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "one.pt")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        Checkpoint.open(tmp_path)


# Anchors of the published code.


def test_npy_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array in (
        np.random.default_rng(0).normal(size=(3, 4, 5)).astype("f4"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">i8"),
        np.array(7, dtype="i2"),
        np.zeros((0, 3), dtype=bool),
    ):
        np.save(path, array)
        got = read_npy(path)
        assert got.shape == array.shape
        assert np.array_equal(got, array)
        assert got.dtype == array.dtype.newbyteorder("=")


def test_npy_of_a_dict(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    anchors = {
        "input": generator.normal(size=(64, 5, 8)).astype("f4"),
        "gt": np.asfortranarray(generator.normal(size=(4, 3)).astype(">f8")),
        "attention_mask": np.zeros((64, 1, 5, 5), "f4"),
        "small": np.arange(3),
        "loss": np.float32(0.5),
        "nested": [1, ("two", None), {"x": np.ones(2)}],
    }
    np.save(tmp_path / "a.npy", anchors)
    got = read_npy(tmp_path / "a.npy")
    assert list(got) == list(anchors)
    for name in ("input", "gt", "attention_mask", "small"):
        assert np.array_equal(got[name], anchors[name])
    assert got["loss"] == 0.5
    assert np.array_equal(got["nested"][2].pop("x"), np.ones(2))
    assert got["nested"] == [1, ("two", None), {}]


def test_npy_of_tensors(tmp_path: Path) -> None:
    tensors = {
        "input": torch.randn(3, 4),
        "gt": torch.randn(4, 3).t(),
        "half": torch.ones(2).half(),
    }
    np.save(tmp_path / "a.npy", tensors)
    got = read_npy(tmp_path / "a.npy")
    assert all(np.array_equal(got[name], t.numpy()) for name, t in tensors.items())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    array = np.arange(12, dtype="f4").reshape(3, 4)
    stream = io.BytesIO(pickle.dumps({"a": array}, protocol))
    path = tmp_path / "a.pkl"
    path.write_bytes(stream.getvalue())
    file = TensorFile(path, "test")
    assert np.array_equal(load_pickle(file)["a"].read(file), array)


def test_arrays_of_numpy_before_2(tmp_path: Path) -> None:
    array = np.arange(12, dtype="f4").reshape(3, 4)
    content = pickle.dumps(array, 2).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in content
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    file = TensorFile(path, "test")
    assert np.array_equal(load_pickle(file).read(file), array)
