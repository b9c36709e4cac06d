"""Whole merges of tiny real checkpoints, and what is refused before anything is written."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fda_fast.anchors import Anchors
from fda_fast.config import parse
from fda_fast.errors import InputError
from fda_fast.layers.call import call_layer
from fda_fast.merge import Report, merge, run

SMALL: dict[str, Any] = {"anchors": 6, "tokens": 3, "steps": 8, "epochs": 5, "device": "cpu"}


def small_merge(tiny, output: Path, **keywords: Any) -> Report:
    experts = keywords.pop("experts", tiny.experts)
    base = keywords.pop("base", tiny.base)
    return merge(base, experts, output, progress=False, **{**SMALL, **keywords})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_merged_model_loads_and_runs(tiny, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    report = small_merge(tiny, tmp_path / "out")
    model = AutoModel.from_pretrained(report.output)
    tokens = AutoTokenizer.from_pretrained(report.output)("a b c", return_tensors="pt")
    assert torch.isfinite(model(**tokens).last_hidden_state).all()
    assert [layer.layer for layer in report.layers] == ["encoder.layer.0", "encoder.layer.1"]
    assert sorted(report.layers[0].tasks) == ["lora", "movie", "news"]
    assert tree(tmp_path) == ["out", *(f"out/{name}" for name in tree(tmp_path / "out"))]
    assert {"README.md", "fda_config.yml", "fda_report.json"} <= set(tree(tmp_path / "out"))
    merged, base = weights(report.output), weights(tiny.base)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    layers = {name for name in base if name.startswith("encoder.layer.")}
    # Only the softmax-invariant key biases get no gradient; nothing outside the layers moves.
    assert changed <= layers
    assert len(layers - changed) <= 2


@pytest.mark.parametrize("start", ["task_arithmetic", "tsv", "wudi"])
def test_adaptation_brings_features_closer_to_the_experts(tiny, tmp_path: Path, start) -> None:
    """What FDA is for: on the anchors the merged layer answers as the experts do."""
    from transformers import AutoModel

    two: dict[str, Any] = {"experts": tiny.experts[:2]}
    small_merge(
        tiny, tmp_path / "fda", start=start, keep_anchors=True, epochs=100, batch_size=3, **two
    )
    small_merge(tiny, tmp_path / "plain", method=start, **two)
    experts = {name: AutoModel.from_pretrained(tiny.folder / name) for name in ("movie", "news")}
    distance = {}
    for which in ("fda", "plain"):
        model = AutoModel.from_pretrained(tmp_path / which)
        total = 0.0
        for task, expert in experts.items():
            for index in range(2):
                name = f"encoder.layer.{index}"
                x = Anchors.load(tmp_path / "fda" / "anchors" / task / f"{name}.safetensors").tensor
                with torch.no_grad():
                    ours = call_layer(model.get_submodule(name), x).flatten(1)
                    theirs = call_layer(expert.get_submodule(name), x).flatten(1)
                total += (1 - torch.cosine_similarity(ours, theirs)).sum().item()
        distance[which] = total
    assert distance["fda"] < 0.8 * distance["plain"]


def test_pretrained_start_lowers_the_adaptation_loss(tiny, tmp_path: Path) -> None:
    report = small_merge(tiny, tmp_path / "out", epochs=40, adapt_lr=1e-3)
    for layer in report.layers:
        assert layer.adaptation is not None
        first, last = layer.adaptation
        assert last < first


def test_task_arithmetic_alone_is_the_formula_for_every_tensor(tiny, tmp_path: Path) -> None:
    small_merge(
        tiny, tmp_path / "out", method="task_arithmetic", scaling=0.4, experts=tiny.experts[:2]
    )
    merged, base = weights(tmp_path / "out"), weights(tiny.base)
    experts = [weights(path) for path in tiny.experts[:2]]
    for name, tensor in base.items():
        wanted = tensor.double() + 0.4 * sum(e[name].double() - tensor.double() for e in experts)
        # The task vectors are formed in float32, so each carries a rounding of its own.
        largest = max(t[name].abs().max().item() for t in (base, merged, *experts))
        bound = 2 * torch.finfo(torch.float32).eps * largest
        assert (merged[name].double() - wanted).abs().max().item() <= bound, name


@pytest.mark.parametrize("method", ["tsv", "wudi"])
def test_plain_starts_agree_with_their_functions(tiny, tmp_path: Path, method: str) -> None:
    from fda_fast.starting import merge_tensor

    small_merge(tiny, tmp_path / "out", method=method, experts=tiny.experts[:2])
    merged, base = weights(tmp_path / "out"), weights(tiny.base)
    experts = [weights(path) for path in tiny.experts[:2]]
    for name, tensor in base.items():
        deltas = [expert[name] - tensor for expert in experts]
        wanted = merge_tensor(method, name, tensor, deltas)  # type: ignore[arg-type]
        assert torch.equal(merged[name], wanted), name


def test_expert_weights_mean_what_they_mean_in_mergekit(tiny, tmp_path: Path) -> None:
    """W_0 + lambda * sum of weight * task vector, with lambda 1."""
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(tiny.base),
        "models": [
            {"model": str(tiny.experts[0]), "parameters": {"weight": 0.5}},
            {"model": str(tiny.experts[1]), "parameters": {"weight": 0.0}},
        ],
    }
    run(parse(config), tmp_path / "out", device="cpu", progress=False)
    merged, base, movie = (weights(p) for p in (tmp_path / "out", tiny.base, tiny.experts[0]))
    name = "encoder.layer.0.output.dense.weight"
    assert torch.allclose(merged[name], (base[name] + movie[name]) / 2, rtol=0, atol=1e-7)


def test_same_settings_give_the_same_bytes_and_seeds_differ(tiny, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small_merge(tiny, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / x / "model.safetensors").read_bytes() for x in "abc")
    assert a == b
    assert a != c
    for name in set(tree(tmp_path / "a")) - {"fda_times.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_one_set_of_anchors_serves_every_start(tiny, tmp_path: Path) -> None:
    """merge(anchors_from=...) adapts to kept anchors; equal bytes to a merge that made its own."""
    kept = small_merge(tiny, tmp_path / "kept", keep_anchors=True).output / "anchors"
    small_merge(tiny, tmp_path / "own", start="tsv")
    small_merge(tiny, tmp_path / "shared", start="tsv", anchors_from=kept)
    own, shared, first = (tmp_path / x / "model.safetensors" for x in ("own", "shared", "kept"))
    assert own.read_bytes() == shared.read_bytes()
    assert own.read_bytes() != first.read_bytes()


def test_construct_then_adapt_equals_merge(tiny, tmp_path: Path) -> None:
    small_merge(tiny, tmp_path / "merged")
    content = json.loads(tiny.config(tmp_path).read_text())
    run(parse(content), tmp_path / "anchors", mode="construct", device="cpu", progress=False)
    assert tree(tmp_path / "anchors")[:3] == [
        "lora",
        "lora/encoder.layer.0.safetensors",
        "lora/encoder.layer.1.safetensors",
    ]
    report = run(
        parse(content),
        tmp_path / "adapted",
        mode="adapt",
        anchors=tmp_path / "anchors",
        device="cpu",
        progress=False,
    )
    one, two = (tmp_path / x / "model.safetensors" for x in ("merged", "adapted"))
    assert one.read_bytes() == two.read_bytes()
    assert report.layers[0].tasks["movie"].loss > 0


def test_anchors_of_other_weights_are_refused(tiny, tmp_path: Path) -> None:
    content = json.loads(tiny.config(tmp_path).read_text())
    run(parse(content), tmp_path / "anchors", mode="construct", device="cpu", progress=False)
    content["models"] = [
        {"model": str(tiny.experts[1]), "name": "movie"},  # news under another's name
    ]
    with pytest.raises(InputError, match="made from other weights of expert movie"):
        run(
            parse(content),
            tmp_path / "out",
            mode="adapt",
            anchors=tmp_path / "anchors",
            device="cpu",
            progress=False,
        )
    assert tree(tmp_path)[-1] == "merge.yaml"


def test_written_dtype_and_shards(tiny, tmp_path: Path) -> None:
    small_merge(tiny, tmp_path / "out", method="task_arithmetic", dtype="bfloat16")
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_outside_start_merges_embeddings_too(tiny, tmp_path: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    base = weights(tiny.base)[name]
    for outside, moved in (("pretrained", False), ("start", True)):
        small_merge(tiny, tmp_path / outside, start="task_arithmetic", outside=outside)
        assert torch.equal(weights(tmp_path / outside)[name], base) is not moved


def test_a_frozen_layer_is_kept(tiny, tmp_path: Path) -> None:
    """Experts that trained the upper layer only: the lower one must come out as it went in."""
    base = weights(tiny.base)
    for name in ("movie", "news"):
        expert = tiny.copy(name, tmp_path / name)
        tensors = weights(expert)
        for key in tensors:
            if key.startswith("encoder.layer.0."):
                tensors[key] = base[key]
        save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    report = small_merge(tiny, tmp_path / "out", experts=[tmp_path / "movie", tmp_path / "news"])
    merged = weights(tmp_path / "out")
    same = {key for key in base if torch.equal(base[key], merged[key])}
    assert {key for key in base if key.startswith("encoder.layer.0.")} <= same
    assert set(report.layers[0].tasks["movie"].cosines.values()) == {0.0}
    assert "encoder.layer.1.output.dense.weight" not in same


def test_a_zero_task_vector_in_one_tensor_counts_as_one(tiny, tmp_path: Path) -> None:
    expert = tiny.copy("movie", tmp_path / "movie")
    tensors = weights(expert)
    key = "encoder.layer.1.output.dense.weight"
    tensors[key] = weights(tiny.base)[key]
    save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    report = small_merge(tiny, tmp_path / "out", experts=[expert, tiny.experts[1]])
    cosines = report.layers[1].tasks["movie"].cosines
    assert cosines["output.dense.weight"] == 0.0
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "out").values())


# ---- what is refused; nothing may be written ----


def nan_in_layer(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    tensors = weights(expert)
    tensors["encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    return expert


def inf_outside(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    tensors = weights(expert)
    tensors["embeddings.word_embeddings.weight"][0, 0] = float("inf")
    save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    return expert


def other_shape(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    tensors = weights(expert)
    tensors["encoder.layer.1.output.dense.weight"] = torch.zeros(32, 65)
    save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    return expert


def other_architecture(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    return expert


def truncated(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    file = expert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return expert


def corrupt(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    file = expert / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    return expert


def missing_shard(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    names = list(weights(expert))
    (expert / "model.safetensors").unlink()
    shards = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (expert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return expert


def index_outside(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    names = list(weights(expert))
    shutil.move(expert / "model.safetensors", folder / "secret.safetensors")
    shards = dict.fromkeys(names, "../secret.safetensors")
    (expert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return expert


def symlink_loop(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    (expert / "model.safetensors").unlink()
    (expert / "model.safetensors").symlink_to("model.safetensors")
    return expert


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def pickle_with_code(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    (expert / "model.safetensors").unlink()
    state = {"encoder.layer.0.output.dense.weight": _Evil(folder / "executed")}
    torch.save(state, expert / "pytorch_model.bin", pickle_module=pickle)
    return expert


def identical(tiny, folder: Path) -> Path:
    return tiny.copy("base", folder / "movie")


def quantised(tiny, folder: Path) -> Path:
    expert = tiny.copy("movie", folder / "movie")
    tensors = weights(expert)
    key = "encoder.layer.1.output.dense.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    return expert


def nothing_there(tiny, folder: Path) -> Path:
    return folder / "movie"


BAD_EXPERTS = {
    nan_in_layer: ["encoder.layer.1.output.dense.weight", "movie", "NaN"],
    other_shape: ["encoder.layer.1.output.dense.weight", "movie", "[32, 65]"],
    other_architecture: ["num_attention_heads", "movie"],
    truncated: ["model.safetensors", "truncated"],
    corrupt: ["model.safetensors", "movie"],
    missing_shard: ["model-00001-of-00001.safetensors", "movie"],
    index_outside: ["../secret.safetensors", "outside"],
    symlink_loop: ["model.safetensors", "movie"],
    pickle_with_code: ["pytorch_model.bin", "movie"],
    identical: ["movie", "identical"],
    quantised: ["encoder.layer.1.output.dense.weight", "F8_E4M3"],
    nothing_there: ["movie", "no such file"],
}


@pytest.mark.parametrize("damage", BAD_EXPERTS, ids=lambda damage: damage.__name__)
def test_a_bad_expert_is_named_and_nothing_is_written(tiny, tmp_path: Path, damage) -> None:
    expert = damage(tiny, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        small_merge(tiny, tmp_path / "out", experts=[expert, tiny.experts[1]], steps=1, epochs=1)
    for words in BAD_EXPERTS[damage]:
        assert words in str(caught.value)
    if damage is nan_in_layer:  # the layer before it was finished; only the output must not exist
        assert not (tmp_path / "out").exists()
    else:
        assert tree(tmp_path) == before
    assert not (tmp_path / "executed").exists()


def test_an_expert_called_as_its_path_is_named_once(tiny, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for path, said in (
        ("nothere", "expert nothere: no such file or folder"),
        ("empty", "the expert empty holds no weights"),
        ("./empty", "the expert empty holds no weights"),
        (tmp_path / "empty", f"the expert empty {tmp_path / 'empty'} holds no weights"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(said)}"):
            small_merge(tiny, tmp_path / "out", experts=[path])


def test_inf_outside_the_layers(tiny, tmp_path: Path) -> None:
    """It is never read by FDA as published, and found where it is."""
    expert = inf_outside(tiny, tmp_path)
    small_merge(tiny, tmp_path / "out", experts=[expert, tiny.experts[1]], steps=1, epochs=1)
    with pytest.raises(InputError, match=r"embeddings\.word_embeddings\.weight.*movie"):
        small_merge(tiny, tmp_path / "out2", experts=[expert], method="task_arithmetic")
    assert not (tmp_path / "out2").exists()


def test_base_whose_config_and_weights_disagree(tiny, tmp_path: Path) -> None:
    base = tiny.copy("base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"config\.json and the weights of the base model"):
        small_merge(tiny, tmp_path / "out", base=base)
    assert tree(tmp_path)[-1] == "base/tokenizer_config.json"


def test_output_with_files_is_refused(tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(InputError, match="Nothing is ever overwritten"):
        small_merge(tiny, tmp_path / "out")
    assert tree(tmp_path) == ["out", "out/precious"]


def test_output_beside_a_file_or_in_an_empty_folder(tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="output"):
        small_merge(tiny, tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    small_merge(tiny, tmp_path / "empty", method="task_arithmetic")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_small_disk_is_refused_before_any_work(tiny, tmp_path: Path, monkeypatch) -> None:
    full = shutil._ntuple_diskusage(10**12, 10**12 - 10**7, 10**7)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match=r"disk.*too small.*0\.01 GB"):
        small_merge(tiny, tmp_path / "out")
    assert tree(tmp_path) == []


def test_misspelt_keyword_suggests_the_nearest(tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'steps'"):
        small_merge(tiny, tmp_path / "out", stesp=3)
    with pytest.raises(InputError, match="Did you mean 'roberta-base'"):
        small_merge(tiny, tmp_path / "out", preset="roberta_bas")
    with pytest.raises(InputError, match="cuda"):
        small_merge(tiny, tmp_path / "out", device="cuda:77")
    assert tree(tmp_path) == []


def test_a_checkpoint_given_twice_is_said(tiny, tmp_path: Path) -> None:
    from fda_fast.job import prepare

    movie, news = tiny.experts[:2]
    (tmp_path / "link").symlink_to(movie)
    models = [{"model": str(path)} for path in (movie, news, tmp_path / "link")]
    content = {"merge_method": "fda", "base_model": str(tiny.base), "models": models}
    job = prepare(parse(content), "cpu")
    assert "link is the same checkpoint as movie, which counts twice" in job.notes
    job.close()
    job = prepare(parse({**content, "models": models[:2]}), "cpu")
    assert not [note for note in job.notes if "same checkpoint" in note]
    job.close()
