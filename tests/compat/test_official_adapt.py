"""The published adapt commands, their anchors files and the models they write."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.compat.official import anchorfiles
from fda_fast.compat.official.commands import main
from fda_fast.compat.official.openclip import OpenClip
from fda_fast.errors import InputError

from . import official_models as models
from .official_models import (
    GLUE,
    NLG_FOLDER,
    NLU_FOLDER,
    STEPS,
    TASKS,
    TOKENS,
    VISION_FOLDER,
    WIDTH,
    nlg_command,
    nlu_command,
    save_state_dict,
    vision_command,
)

EPOCHS, BATCH = 3, 5
ADAPT = ("--adapt_epochs", EPOCHS, "--adapt_batch_size", BATCH)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def published_adapt(layer, x, y, lr, loss, flatten, start=None):
    """The published adaptation, written out, with torch's own loader on the global generator.

    Args: a layer; anchors and targets, one item each; ``start``: None, or [(layer_k, alpha_k)].
    Returns {name: adapted weight}.
    """
    base = {name: p.detach().clone() for name, p in layer.named_parameters()}
    if start is None:
        leaves = {name: p.clone().requires_grad_() for name, p in base.items()}
        weights = lambda: leaves  # noqa: E731
        trained = list(leaves.values())
    else:
        taus = [{n: p.detach() - base[n] for n, p in m.named_parameters()} for m, _ in start]
        alphas = [{n: torch.full_like(p, a, requires_grad=True) for n, p in base.items()}
                  for _, a in start]  # fmt: skip
        trained = [alpha for each in alphas for alpha in each.values()]
        weights = lambda: {  # noqa: E731
            n: p + sum(a[n] * tau[n] for a, tau in zip(alphas, taus, strict=True))
            for n, p in base.items()
        }
    optimizer = torch.optim.Adam(trained, lr=lr)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            optimizer.zero_grad()
            output = flatten(lambda z: functional_call(layer, weights(), (z,)), inputs)
            targets = targets.flatten(1)
            if loss == "cos":
                value = -F.cosine_similarity(output, targets, dim=1).sum()
            else:
                value = (F.mse_loss if loss == "mse" else F.l1_loss)(
                    output, targets, reduction="sum"
                )
            value.backward()
            optimizer.step()
    return {name: weight.detach() for name, weight in weights().items()}


def sequence_first(run: Callable, x):
    return run(x.transpose(0, 1)).transpose(0, 1).flatten(1)


def batch_first(run: Callable, x):
    y = run(x)
    return (y[0] if isinstance(y, tuple) else y).flatten(1)


def assert_adapted(ours, theirs, base):
    """Equal to a thousandth of what adaptation moved, but for key biases, which Adam moves by
    the sign of rounding."""
    moved = off = 0.0
    for name, tensor in theirs.items():
        keep = torch.ones_like(tensor)
        if name.endswith("key.bias"):
            keep.zero_()
        elif name.endswith("in_proj_bias"):
            keep.chunk(3)[1].zero_()
        moved += ((tensor - base[name]) * keep).square().sum().item()
        off += ((tensor - ours[name]) * keep).square().sum().item()
    assert moved > 0
    assert off**0.5 <= 1e-3 * moved**0.5


def save_like_theirs(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, value)


def vision_anchors(root: Path, count: int = 4) -> dict[str, list[torch.Tensor]]:
    """Anchors [T, n, d] of every layer in the files construct_fda.py would write."""
    generator = torch.Generator().manual_seed(9)
    found = {}
    for task in TASKS:
        found[task] = [torch.randn(TOKENS, count, WIDTH, generator=generator) for _ in range(2)]
        for index, x in enumerate(found[task]):
            name = f"dual_anchors_layer_{index + 1}.npy"
            save_like_theirs(root / VISION_FOLDER / task / name, x.numpy())
    return found


def nlu_anchors(root: Path, experts, targets_of=None) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(9)
    found = {}
    for task in GLUE:
        answers = (targets_of or experts)[task].roberta.encoder.layer
        found[task] = [torch.randn(4, 5, WIDTH, generator=generator) for _ in range(2)]
        for index, x in enumerate(found[task]):
            with torch.no_grad():
                target = batch_first(answers[index], x).view_as(x)
            value = {"input": x.numpy(), "gt": target.numpy()}
            value["attention_mask"] = np.zeros((4, 1, 5, 5), np.float32)
            name = f"dual_anchors_layer_{index + 1}.npy"
            save_like_theirs(root / NLU_FOLDER / task / name, value)
    return found


def merged_state(root: Path, suffix: str = ".pt") -> dict[str, torch.Tensor]:
    path = next(root.rglob(f"merged_model_by_*{suffix}"))
    return torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)


# Vision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "loss", "lr"), [("pretrained", "cos", 1e-3), ("ta", "cos", 1e-2), ("ta", "l1", 1e-2)]
)
def test_vision_adapts_their_anchors_as_they_do(tmp_path: Path, start, loss, lr) -> None:
    base, experts = models.vision(tmp_path, TASKS, save_state_dict)
    anchors = vision_anchors(tmp_path)
    more = ("--init_params", start, "--adapt_loss", loss, "--adapt_lr", lr, "--seed", 4)
    assert vision_command("adapt", tmp_path, *ADAPT, *more) == 0
    merged = merged_state(tmp_path)
    torch.manual_seed(4)
    for index in range(2):
        layers = {task: experts[task].blocks[index] for task in TASKS}
        with torch.no_grad():
            y = torch.cat([layers[t](anchors[t][index]).transpose(0, 1) for t in TASKS])
        x = torch.cat([anchors[task][index].transpose(0, 1) for task in TASKS])
        begin = None if start == "pretrained" else [(layer, 0.3) for layer in layers.values()]
        theirs = published_adapt(base.blocks[index], x, y, lr, loss, sequence_first, begin)
        prefix = f"model.visual.transformer.resblocks.{index}."
        ours = {n.removeprefix(prefix): t for n, t in merged.items() if n.startswith(prefix)}
        pretrained = dict(base.blocks[index].named_parameters())
        begun = {
            name: p.detach() + sum(a * (layer.get_parameter(name) - p) for layer, a in begin or [])
            for name, p in pretrained.items()
        }
        assert_adapted(ours, theirs, begun)


def test_vision_writes_a_plain_state_dict_and_safetensors(tmp_path: Path) -> None:
    base, _ = models.vision(tmp_path, TASKS, save_state_dict)
    vision_anchors(tmp_path)
    assert vision_command("adapt", tmp_path, *ADAPT, "--adapt_loss", "cos") == 0
    state = merged_state(tmp_path)
    deepcopy(base).load_state_dict(state)  # theirs loads it: names and shapes
    twin = merged_state(tmp_path, ".safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in twin.items())
    positions = "model.visual.positional_embedding"
    assert torch.equal(state[positions], base.state_dict()[positions])
    (path,) = tmp_path.rglob("merged_model_by_pretrained.pt")
    run = f"anchor-4-scale-0.01-adapt-{EPOCHS}-0.01-{BATCH}-cos"
    assert path.parent == tmp_path / "ViT-B-32/ViT-B-32/init_by_gauss_random" / run
    assert (path.parent / "adaptation_settings.text").is_file()
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("start", ["tsv", "wudi"])
def test_merged_starts_are_read_or_made(tmp_path: Path, start, capsys) -> None:
    models.vision(tmp_path, TASKS, save_state_dict)
    vision_anchors(tmp_path)
    line = ("--adapt_epochs", EPOCHS, "--adapt_batch_size", 4, "--init_params", start)
    assert vision_command("adapt", tmp_path, *line, "--as-published") == 2
    assert f"merged_{start}" in capsys.readouterr().err
    assert vision_command("adapt", tmp_path, *line) == 0
    made = merged_state(tmp_path)
    # Given as a file, the merged model is what adaptation starts from.
    shutil.copy(tmp_path / "ViT-B-32/MNIST/finetuned.pt", tmp_path / f"ViT-B-32/merged_{start}.pt")
    frozen = (*line, "--adapt_lr", 0)
    shutil.rmtree(tmp_path / "ViT-B-32/ViT-B-32")
    assert vision_command("adapt", tmp_path, *frozen) == 0
    given = merged_state(tmp_path)
    expert = torch.load(tmp_path / "ViT-B-32/MNIST/finetuned.pt", weights_only=True)
    name = "model.visual.transformer.resblocks.1.mlp.c_fc.weight"
    torch.testing.assert_close(given[name], expert[name], rtol=0, atol=1e-6)
    assert not torch.equal(made[name], given[name])


def test_batches_that_mix_up_the_published_rows(tmp_path: Path, capsys) -> None:
    models.vision(tmp_path, TASKS, save_state_dict)
    vision_anchors(tmp_path)
    line = ("--adapt_epochs", 1, "--adapt_batch_size", 5)
    assert vision_command("adapt", tmp_path, *line, "--as-published") == 2
    assert "a divisor" in capsys.readouterr().err
    assert vision_command("adapt", tmp_path, *line) == 0


def test_vision_from_hugging_face_directories(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    base = models.finetuned(CLIPVisionModel(config), 0.1)
    home = tmp_path / "ViT-B-32"
    base.save_pretrained(home / "zeroshot")
    for task in TASKS:
        models.finetuned(base).save_pretrained(home / task / "finetuned")
    assert vision_command("construct", tmp_path) == 0
    array = np.load(tmp_path / VISION_FOLDER / "Cars" / "dual_anchors_layer_2.npy")
    assert array.shape == (5, 4, WIDTH)  # 4 patches and the class token
    assert vision_command("adapt", tmp_path, *ADAPT, "--adapt_loss", "cos") == 0
    (folder,) = tmp_path.rglob("merged_model_by_pretrained")
    merged = CLIPVisionModel.from_pretrained(folder)
    moved = [not torch.equal(p, merged.get_parameter(n)) for n, p in base.named_parameters()]
    assert any(moved) and not all(moved)


# NLU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pretrained", "ta"])
@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("as_published", [(), ("--as-published",)])
def test_nlu_adapts_their_anchors_as_they_do(tmp_path, start, classifier, as_published) -> None:
    base, experts = models.nlu(tmp_path, GLUE, classifier, dropout=0.0)
    anchors = nlu_anchors(tmp_path, experts)
    more = ("--init_params", start, "--adapt_lr", 1e-3, *as_published)
    assert nlu_command("adapt", tmp_path, *ADAPT, *more) == 0
    (folder,) = tmp_path.rglob(f"merged_model_by_{start}")
    merged = load_file(folder / "model.safetensors")

    def load_pretrained() -> None:
        if not classifier:
            torch.empty(WIDTH, WIDTH).normal_()
            torch.empty(2, WIDTH).normal_()

    torch.manual_seed(0)
    load_pretrained()
    for index in range(2):
        if start != "pretrained":
            load_pretrained()
        layers = {task: experts[task].roberta.encoder.layer[index] for task in GLUE}
        x = torch.cat([anchors[task][index] for task in GLUE])
        with torch.no_grad():
            y = torch.cat([batch_first(layers[t], anchors[t][index]) for t in GLUE])
        begin = None if start == "pretrained" else [(layer, 0.3) for layer in layers.values()]
        layer = base.roberta.encoder.layer[index]
        theirs = published_adapt(layer, x, y, 1e-3, "mse", batch_first, begin)
        prefix = f"roberta.encoder.layer.{index}."
        ours = {n.removeprefix(prefix): t for n, t in merged.items() if n.startswith(prefix)}
        begun = {
            name: p.detach() + sum(a * (e.get_parameter(name) - p) for e, a in begin or [])
            for name, p in layer.named_parameters()
        }
        assert_adapted(ours, theirs, begun)


def test_nlu_writes_a_directory_that_transformers_loads(tmp_path: Path, capsys) -> None:
    from transformers import AutoModelForSequenceClassification

    base, experts = models.nlu(tmp_path, GLUE)
    nlu_anchors(tmp_path, experts)
    assert nlu_command("adapt", tmp_path, *ADAPT) == 0
    (folder,) = tmp_path.rglob("merged_model_by_pretrained")
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    name = "roberta.embeddings.word_embeddings.weight"
    assert torch.equal(merged.get_parameter(name), base.get_parameter(name))
    name = "roberta.encoder.layer.1.output.dense.weight"
    assert not torch.equal(merged.get_parameter(name), base.get_parameter(name))
    assert nlu_command("adapt", tmp_path, *ADAPT) == 2  # Nothing is overwritten.
    assert "Nothing is ever overwritten" in capsys.readouterr().err


def test_alpha_counts_unless_as_published(tmp_path: Path) -> None:
    _, experts = models.nlu(tmp_path, GLUE, dropout=0.0)
    nlu_anchors(tmp_path, experts)
    name = "roberta.encoder.layer.0.output.dense.weight"
    found = {}
    for label, more in {
        "default": (),
        "0.3": ("--alpha", 0.3),
        "1": ("--alpha", 1.0),
        "published": ("--alpha", 1.0, "--as-published"),
    }.items():
        line = (*ADAPT, "--init_params", "ta", "--adapt_lr", 0, *more)
        assert nlu_command("adapt", tmp_path, *line) == 0
        (folder,) = tmp_path.rglob("merged_model_by_ta")
        found[label] = load_file(folder / "model.safetensors")[name]
        shutil.rmtree(folder)
    assert torch.equal(found["default"], found["0.3"])
    torch.testing.assert_close(found["published"], found["0.3"], rtol=0, atol=1e-6)
    assert (found["1"] - found["0.3"]).abs().max() > 1e-3


def test_stored_targets_of_other_experts(tmp_path: Path, capsys) -> None:
    base, experts = models.nlu(tmp_path, GLUE)
    others = {task: models.finetuned(base, 0.3) for task in GLUE}
    nlu_anchors(tmp_path, experts, targets_of=others)
    assert nlu_command("adapt", tmp_path, *ADAPT) == 2
    assert "are not the outputs of the expert of cola" in capsys.readouterr().err
    assert not list(tmp_path.rglob(".*partial"))
    assert nlu_command("adapt", tmp_path, *ADAPT, "--as-published") == 0


def test_dropout_is_on_from_a_merged_start_as_published(tmp_path: Path) -> None:
    from transformers.models.roberta.modeling_roberta import RobertaLayer

    _, experts = models.nlu(tmp_path, GLUE, dropout=0.5)
    nlu_anchors(tmp_path, experts)
    modes = []
    forward = RobertaLayer.forward

    def noted(self, *args, **kwargs):
        modes.append(self.training)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RobertaLayer, "forward", noted)
        line = (*ADAPT, "--init_params", "ta")
        assert nlu_command("adapt", tmp_path, *line, "--as-published") == 0
        assert any(modes)
        (folder,) = tmp_path.rglob("merged_model_by_ta")
        shutil.rmtree(folder)
        modes.clear()
        assert nlu_command("adapt", tmp_path, *line) == 0
        assert not any(modes)
        modes.clear()
        assert nlu_command("adapt", tmp_path, *ADAPT, "--as-published") == 0
        assert modes and not any(modes)


# NLG ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cos", "mse"])
def test_nlg_adapts_their_anchors_as_they_do(tmp_path: Path, loss) -> None:
    base, experts, merged = models.nlg(tmp_path)
    generator = torch.Generator().manual_seed(9)
    anchors = {task: [] for task in ("math", "code")}
    for task, index in ((t, i) for t in anchors for i in range(2)):
        anchors[task].append(torch.randn(20, WIDTH, generator=generator))
        name = f"dual_anchors_layer_{index + 1}.npy"
        path = tmp_path / "anchors" / task / NLG_FOLDER / name
        save_like_theirs(path, anchors[task][-1].numpy())
    more = ("--merged_model_path", tmp_path / "math" / "merged", "--adapt_loss", loss)
    more += ("--save_merged_model_path", tmp_path / "out", *ADAPT)
    assert nlg_command("adapt", tmp_path, *more) == 0
    (path,) = (tmp_path / "out").rglob("math/model.safetensors")
    weights = load_file(path)
    torch.manual_seed(0)
    for index in range(2):
        layers = {task: experts[task].model.layers[index].mlp for task in anchors}
        x = torch.cat([anchors[task][index] for task in anchors])
        with torch.no_grad():
            y = torch.cat([layers[task](anchors[task][index]) for task in anchors])
        begin = [(merged.model.layers[index].mlp, 1.0)]
        pretrained = base.model.layers[index].mlp
        theirs = published_adapt(pretrained, x, y, 1e-2, loss, batch_first, begin)
        prefix = f"model.layers.{index}.mlp."
        ours = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        assert_adapted(ours, theirs, dict(begin[0][0].named_parameters()))
    for name, tensor in merged.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(weights[name], tensor), name
    # The second folder: the same weights, linked, with the other tokenizer.
    code = path.parent.with_name("code")
    assert os.path.samefile(path, code / path.name)
    for twin in ("math", "code"):
        text = (path.parent.with_name(twin) / "tokenizer_config.json").read_text()
        assert json.loads(text) == {"of": twin}


def test_nlg_from_split_folders(tmp_path: Path) -> None:
    """What split_model.py makes, with the whole models gone, gives the same anchors."""
    base, experts, _ = models.nlg(tmp_path)
    assert nlg_command("construct", tmp_path) == 0
    files = {path: np.load(path) for path in (tmp_path / "anchors").rglob("*.npy")}
    for name, model in {
        "Llama-2-13b-hf": base,
        "WizardMath-13B-V1.0": experts["math"],
        "llama-2-13b-code-alpaca": experts["code"],
    }.items():
        split_like_theirs(model, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "anchors")
    assert nlg_command("construct", tmp_path) == 0
    assert files and all(np.array_equal(np.load(path), array) for path, array in files.items())


def split_like_theirs(model, folder: Path) -> None:
    parts = {
        "model.embed_tokens": model.model.embed_tokens,
        "model.norm": model.model.norm,
        "lm_head": model.lm_head,
    }
    parts |= {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    names = {name: name.replace("layers", "layer").replace(".", "_") + ".pt" for name in parts}
    (folder / "split").mkdir()
    for name, part in parts.items():
        torch.save(part, folder / "split" / names[name])
    (folder / "split" / "model_index.json").write_text(json.dumps(names))


def test_adapt_without_anchors_says_where_they_should_be(tmp_path: Path, capsys) -> None:
    models.nlg(tmp_path)
    more = ("--merged_model_path", tmp_path / "math" / "merged")
    assert nlg_command("adapt", tmp_path, *more, "--save_merged_model_path", tmp_path / "out") == 2
    assert f"{NLG_FOLDER}/dual_anchors_layer_1.npy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Anchors files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["vision", "nlu", "nlg"])
def test_round_trip(tmp_path: Path, modality: str) -> None:
    shape = (20, WIDTH) if modality == "nlg" else (4, TOKENS, WIDTH)
    x = torch.randn(shape)
    layer = nn.Linear(WIDTH, WIDTH)
    anchorfiles.write(tmp_path / "a" / "x.npy", x, layer, modality)
    found = anchorfiles.read(tmp_path / "a" / "x.npy", modality)
    assert torch.equal(found.anchors, x)
    if modality == "nlu":
        torch.testing.assert_close(found.targets, layer(x).detach())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.npy"]


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    x = np.zeros((4, 5, WIDTH), np.float32)
    value = {"input": x, "gt": x, "attention_mask": Harmful(tmp_path / "ran")}
    np.save(tmp_path / "x.npy", value)
    with pytest.raises(InputError, match="mkdir"):
        anchorfiles.read(tmp_path / "x.npy", "nlu")
    assert not (tmp_path / "ran").exists()


def nlu_value(**changes):
    x = np.ones((4, 5, WIDTH), np.float32)
    return {"input": x, "gt": x, "attention_mask": np.zeros((4, 1, 5, 5)), **changes}


@pytest.mark.parametrize(
    ("modality", "value", "words"),
    [
        ("vision", np.ones((4, WIDTH), np.float32), "3 dimensions"),
        ("vision", nlu_value(), "3 dimensions"),
        ("nlg", np.ones((4, 5, WIDTH), np.float32), "2 dimensions"),
        ("nlg", np.ones((4, WIDTH), np.int64), "int64"),
        ("nlg", np.full((4, WIDTH), np.nan, np.float32), "NaN"),
        ("nlu", np.ones((4, 5, WIDTH), np.float32), "a dict of input, gt"),
        ("nlu", {"input": np.ones((4, 5, WIDTH))}, "a dict of input, gt"),
        ("nlu", nlu_value(gt=np.ones((4, 6, WIDTH), np.float32)), "gt"),
        ("nlu", nlu_value(attention_mask=-np.ones((4, 1, 5, 5))), "hides tokens"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, modality, value, words) -> None:
    np.save(tmp_path / "x.npy", value)
    with pytest.raises(InputError, match=words):
        anchorfiles.read(tmp_path / "x.npy", modality)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, WIDTH), np.float32))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-5])
    with pytest.raises(InputError):
        anchorfiles.read(tmp_path / "x.npy", "nlg")


# Encoders pickled as modules ---------------------------------------------------------------------


def test_heads_and_activation_come_from_a_pickled_module(tmp_path: Path) -> None:
    """A module pickled whole says how many heads it has; no --head_width is given."""
    base, _ = models.vision(tmp_path, TASKS, save_module)
    line = ["--model_location", tmp_path, "--tasks", *TASKS, "--anchor_num", 4, "--device", "cpu"]
    line += ["--save_anchors_path", tmp_path / "anchors", "--scale", 0.01, "--opt_steps", STEPS]
    assert main(["vision", "construct", "--quiet", *map(str, line)]) == 0
    home = tmp_path / "ViT-B-32"
    found = OpenClip(
        home / "zeroshot.pt", {"Cars": home / "Cars/finetuned.pt"}, torch.device("cpu")
    )
    block, _ = found.read(0)
    assert block.attn.num_heads == base.blocks[0].attn.num_heads == 4
    x = torch.randn(TOKENS, 2, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(block(x), base.blocks[0](x))


def save_module(model, stem) -> None:
    """``torch.save(model)`` under the class names that checkpoints of open_clip hold."""
    path = Path(f"{stem}.pt")
    torch.save(model, path)
    renamed = {
        "Encoder": ("src.modeling", "ImageEncoder"),
        "Block": ("open_clip.model", "ResidualAttentionBlock"),
        "QuickGELU": ("open_clip.model", "QuickGELU"),
    }
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for name, data in members.items():
        if name.endswith("data.pkl"):
            for old, (module, new) in renamed.items():
                line = f"c{models.__name__}\n{old}\n".encode()
                data = data.replace(line, f"c{module}\n{new}\n".encode())
            members[name] = data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert Checkpoint.open(path).modules
