"""The written checkpoint: loads, equals what was added, is the same every time, or is not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

from fda_fast.checkpoints import outputs, writer
from fda_fast.checkpoints.card import hub_name, model_card
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.writer import MergedWriter, parse_size, shard_names
from fda_fast.errors import InputError

from ..conftest import contents
from .conftest import finetune, rewrite, tensors_of

Family = Callable[[str], Path]
FAMILIES = ("bert", "roberta", "vit", "clip", "gpt2", "llama", "qwen2", "gemma2")


def layout_of(path: Path) -> ModelLayout:
    return ModelLayout.from_checkpoint(Checkpoint.open(path))


def write(layout: ModelLayout, output: Path, backwards: bool = False, **options: Any) -> Path:
    """Write the 1 % fine-tune of the base, tensors in either order."""
    merged = finetune(layout.base.read(sorted(layout.base.names)))
    with MergedWriter(output, layout, **options) as target:
        for name in reversed(target.names) if backwards else target.names:
            target.add(name, merged[name])
        return target.finish(card="# card\n", config_yaml="merge_method: fda\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_it(family: Family, tmp_path: Path, name: str) -> None:
    layout = layout_of(family(name))
    out = write(layout, tmp_path / "out")
    kind = getattr(hf, layout.base.config["architectures"][0])
    model, info = kind.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = finetune(layout.base.read(sorted(layout.base.names)))
    written = load_file(out / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n], expected[n]) for n in expected)
    # And the model holds them: saved again it gives the same tensors.
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[n], expected[n]) for n in expected)
    assert (out / "config.json").read_bytes() == (family(name) / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sharded_and_the_same_bytes_in_any_order(
    family: Family, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    layout = layout_of(family("bert"))
    first = write(layout, tmp_path / "a", shard_size="4KB", dtype=dtype)
    second = write(layout, tmp_path / "b", backwards=True, shard_size="4KB", dtype=dtype)
    assert contents(first) == contents(second)
    index = json.loads((first / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, 1 + len(shards))
    ]
    tensors = {n: t for s in shards for n, t in load_file(first / s).items()}
    expected = finetune(layout.base.read(sorted(layout.base.names)))
    assert all(torch.equal(tensors[n], expected[n].to(dtype or torch.float32)) for n in expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    hf.BertForMaskedLM.from_pretrained(first)
    reopened = Checkpoint.open(first)
    assert reopened.notes == []
    config = json.loads((first / "config.json").read_text())
    said = config.get("dtype") or config["torch_dtype"]  # by the version of transformers
    assert said == ("bfloat16" if dtype else "float32")


def test_side_files_are_copied(family: Family, tmp_path: Path) -> None:
    base = rewrite(family("bert"), tmp_path / "base")
    for name in outputs.SIDE_FILES:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    (base / "training_args.bin").write_text("not this one")
    out = write(layout_of(base), tmp_path / "out")
    for name in outputs.SIDE_FILES:
        assert (out / name).read_text() == name
    assert not (out / "training_args.bin").exists()
    assert (out / "README.md").read_text() == "# card\n"
    assert (out / "fda_config.yml").read_text() == "merge_method: fda\n"


def test_side_file_linking_outside_is_not_followed(family: Family, tmp_path: Path) -> None:
    base = rewrite(family("bert"), tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="link to a file outside"):
        write(layout_of(base), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "secret"]


def test_tied_weights_are_written_once(family: Family, tmp_path: Path) -> None:
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    base = rewrite(family("qwen2"), tmp_path / "b", lambda ts: {**ts, head: ts[embed].clone()})
    layout = layout_of(base)
    out = write(layout, tmp_path / "out")
    written = load_file(out / "model.safetensors")
    assert len(written) == len(layout.base.names) - 1
    assert (head in written) != (embed in written)
    model, info = hf.Qwen2ForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_wrapped_names_are_written_as_transformers_wants_them(
    family: Family, tmp_path: Path
) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors.items()}
        return {f"module.{n}": t for n, t in old.items()}

    out = write(layout_of(rewrite(family("bert"), tmp_path / "b", wrap)), tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == tensors_of(family("bert")).keys()


def test_old_config_becomes_loadable(family: Family, tmp_path: Path) -> None:
    base = rewrite(family("bert"), tmp_path / "b")
    config = json.loads((base / "config.json").read_text())
    del config["model_type"], config["architectures"]
    (base / "config.json").write_text(json.dumps(config))
    out = write(layout_of(base), tmp_path / "out")
    assert isinstance(hf.AutoModel.from_pretrained(out), hf.BertModel)


def test_output_must_be_new_or_empty(family: Family, tmp_path: Path) -> None:
    layout = layout_of(family("bert"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        before = contents(tmp_path)
        with pytest.raises(InputError, match="a new or empty directory"):
            MergedWriter(tmp_path / name, layout)
        assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    write(layout, tmp_path / "empty")
    write(layout, tmp_path / "deep" / "er")


def test_leaving_early_leaves_nothing(family: Family, tmp_path: Path) -> None:
    layout = layout_of(family("bert"))
    with MergedWriter(tmp_path / "out", layout) as target:
        assert os.listdir(tmp_path) == [".out.partial"]
        target.add(target.names[0], layout.base.read(target.names[:1])[target.names[0]])
        with pytest.raises(InputError, match="tensors were never added"):
            target.finish(card="")
    assert os.listdir(tmp_path) == []


def test_rest_of_a_killed_run_is_replaced_and_nothing_else(family: Family, tmp_path: Path) -> None:
    layout = layout_of(family("bert"))
    MergedWriter(tmp_path / "out", layout)  # never closed: as after kill -9
    write(layout, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".other.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        MergedWriter(tmp_path / "other", layout)
    assert (tmp_path / ".other.partial" / "thesis.tex").read_text() == "mine"


def test_disk_too_small_is_known_beforehand(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"disk of output .* too small"):
        MergedWriter(tmp_path / "out", layout_of(family("bert")))
    assert os.listdir(tmp_path) == []


def test_disk_filling_up_leaves_nothing(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        MergedWriter(tmp_path / "out", layout_of(family("bert")))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_really_full_disk(family: Family, tmp_path: Path) -> None:
    # A file size limit stands in for a full disk: the kernel refuses the same way.
    resource = pytest.importorskip("resource")
    layout = layout_of(family("bert"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            MergedWriter(tmp_path / "out", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_refused_tensors(family: Family, tmp_path: Path) -> None:
    layout = layout_of(family("bert"))
    name = layout.layers[0].parameters["output.dense.weight"]
    good = layout.base.read([name])[name]
    with MergedWriter(tmp_path / "out", layout, dtype=torch.float16) as target:
        with pytest.raises(InputError, match="'nope'"):
            target.add("nope", good)
        with pytest.raises(InputError, match=r"expected \[16, 24\], got \[24, 16\]"):
            target.add(name, good.T)
        with pytest.raises(InputError, match=r"not finite in float16.*bfloat16"):
            target.add(name, good + 1e6)
        with pytest.raises(InputError, match="not finite"):
            target.add(name, good * torch.nan)


def test_shard_sizes() -> None:
    assert [parse_size(s) for s in ("5GB", "2GiB", "10 mb", 77, "3KB")] == [
        5 * 10**9,
        2 * 2**30,
        10**7,
        77,
        3000,
    ]
    for wrong in ("", "5", "GB", "-5GB", "5TB", "0GB", True, 0, "1.5GB"):
        if wrong == "5":
            assert parse_size(wrong) == 5
            continue
        with pytest.raises(InputError, match="shard size"):
            parse_size(wrong)
    sizes = {"a": 3, "b": 3, "big": 50, "c": 1, "d": 9, "e": 1}
    assert list(shard_names(sizes, 10).values()) == [["a", "b"], ["big"], ["c", "d"], ["e"]]
    assert list(shard_names(sizes, 100)) == ["model.safetensors"]


def test_model_card(family: Family, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--base-model" / "snapshots" / "abc"
    base = Checkpoint.open(rewrite(family("bert"), cache))
    one = Checkpoint.open(rewrite(family("bert"), tmp_path / "one"), "expert one")
    two = Checkpoint.open(rewrite(family("bert"), tmp_path / "one|<b>"), "expert two")
    card = model_card(
        "merged",
        base,
        {"one": one, "two": two},
        method="FDA",
        settings={"steps": 1200, "a|b": "x\ny"},
        config_yaml="models:\n```\n",
    )
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == {
        "base_model": ["org/base-model", "one"],  # no model could be named one|<b>
        "library_name": "transformers",
        "tags": ["fda", "mergekit", "merge"],
    }
    assert "| a\\|b | x y |" in body
    assert "&lt;b>" in body
    assert "\n````yaml\n" in body
    assert str(tmp_path) not in card
    assert hub_name(base) == "org/base-model"


def test_without_posix_fallocate(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(family("bert"))
    expected = contents(write(layout, tmp_path / "a"))
    monkeypatch.delattr(writer.os, "posix_fallocate")
    assert contents(write(layout, tmp_path / "b")) == expected
