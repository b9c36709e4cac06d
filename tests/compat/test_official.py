"""The published scripts' commands: what they read, write and compute."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fda_fast.checkpoints.openclip import ResidualAttentionBlock
from fda_fast.compat.official import anchorfiles, constructing, flags, folders, optimise
from fda_fast.compat.official.commands import main
from fda_fast.compat.official.streams import Stream
from fda_fast.errors import InputError

from . import official_models as models
from .official_models import (
    GLUE,
    NLG_FOLDER,
    NLU_FOLDER,
    STEPS,
    TASKS,
    VISION_FOLDER,
    nlg_command,
    nlu_command,
    save_safetensors,
    save_state_dict,
    vision_command,
)


@sdpa_kernel(SDPBackend.MATH)  # the only one with a second derivative
def published_loop(pretrained, finetuned, x, steps, lr, flatten, loss="cos"):
    """The published construction, written out: losses and the best X."""
    x = x.clone().requires_grad_()
    theta, theta_i = list(pretrained.parameters()), list(finetuned.parameters())
    optimizer = torch.optim.AdamW([x], lr=lr)
    losses, best, best_x = [], float("inf"), None
    for _ in range(steps):
        optimizer.zero_grad()
        y, y_i = flatten(pretrained(x)), flatten(finetuned(x))
        similarity = {
            "cos": lambda a, b: F.cosine_similarity(a, b, dim=1).mean(),
            "mse": lambda a, b: -F.mse_loss(a, b),
            "l1": lambda a, b: -F.l1_loss(a, b),
        }[loss](y, y_i)
        gradients = torch.autograd.grad(similarity, theta, create_graph=True)
        total = sum(
            1 - F.cosine_similarity(g.flatten(), (b - a).detach().flatten(), dim=0)
            for g, a, b in zip(gradients, theta, theta_i, strict=True)
        )
        (x.grad,) = torch.autograd.grad(total, [x])
        losses.append(total.item())
        if losses[-1] < best:
            best, best_x = losses[-1], x.detach().clone()
        optimizer.step()
    return torch.tensor(losses), best_x


def anchors_first(y):
    """[T, n, d] -> [n, T d]: what the Vision script compares."""
    return y.transpose(0, 1).flatten(1)


def whole(y):
    return (y[0] if isinstance(y, tuple) else y).flatten(1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def histories(monkeypatch):
    """Losses [steps, tasks] of every construction of a command."""
    found = []
    construct = constructing.construct

    def noted(*args, **kwargs):
        result = construct(*args, **kwargs)
        found.append(result.history)
        return result

    monkeypatch.setattr(constructing, "construct", noted)
    return found


# Construction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_state_dict, save_safetensors])
def test_vision_construct_is_the_published_loop(tmp_path: Path, histories, save) -> None:
    base, experts = models.vision(tmp_path, TASKS, save)
    assert vision_command("construct", tmp_path) == 0
    generator = torch.Generator().manual_seed(0)  # anew for every layer and task
    start = torch.randn(models.TOKENS, 4, models.WIDTH, generator=generator) * 0.01
    for index, task in itertools.product(range(2), TASKS):
        losses, best = published_loop(
            base.blocks[index], experts[task].blocks[index], start, STEPS, 1e-2, anchors_first
        )
        ours = histories[index][:, TASKS.index(task)]
        torch.testing.assert_close(ours.float(), losses, rtol=0, atol=1e-4)
        array = np.load(tmp_path / VISION_FOLDER / task / f"dual_anchors_layer_{index + 1}.npy")
        assert array.dtype == np.float32 and array.flags.c_contiguous
        assert (torch.from_numpy(array) - best).norm() < 1e-3 * best.norm()
    assert "opt_steps = 6\n" in (tmp_path / VISION_FOLDER / "construct_settings.text").read_text()


@pytest.mark.parametrize("classifier", [True, False])
def test_nlu_construct_is_the_published_loop(tmp_path: Path, histories, classifier) -> None:
    base, experts = models.nlu(tmp_path, GLUE, classifier)
    assert nlu_command("construct", tmp_path, name="init_by_weights_pos") == 0
    torch.manual_seed(0)
    layers = {task: expert.roberta.encoder.layer for task, expert in experts.items()}
    for index, task in itertools.product(range(2), GLUE):
        if not classifier:
            # What loading for classification draws for the head that the checkpoint lacks.
            torch.empty(models.WIDTH, models.WIDTH).normal_(0, 0.02)
            torch.empty(2, models.WIDTH).normal_(0, 0.02)
        rows = torch.cat(
            [
                p.detach()
                for p in layers[task][index].parameters()
                if p.ndim == 2 and p.shape[1] == models.WIDTH
            ]
        )
        start = rows[torch.randperm(len(rows))[:20]].reshape(4, 5, models.WIDTH)
        losses, best = published_loop(
            base.roberta.encoder.layer[index], layers[task][index], start, STEPS, 1e-2, whole
        )
        ours = histories[index][:, GLUE.index(task)]
        torch.testing.assert_close(ours.float(), losses, rtol=0, atol=1e-4)
        folder = f"anchors/roberta-base/init_by_weights_pos-anchor-4-scale-1.0-opt-{STEPS}-0.01"
        path = tmp_path / folder / task / f"dual_anchors_layer_{index + 1}.npy"
        found = np.load(path, allow_pickle=True).item()  # as adapt.py does
        assert list(found) == ["input", "gt", "attention_mask"]
        assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
            "input": (np.float32, (4, 5, models.WIDTH)),
            "gt": (np.float32, (4, 5, models.WIDTH)),
            "attention_mask": (np.float32, (4, 1, 5, 5)),
        }
        assert not found["attention_mask"].any()
        assert (torch.from_numpy(found["input"]) - best).norm() < 1e-3 * best.norm()
        with torch.no_grad():
            target = whole(layers[task][index](torch.from_numpy(found["input"])))
        torch.testing.assert_close(torch.from_numpy(found["gt"]).flatten(1), target)


def test_nlg_construct_is_the_published_loop(tmp_path: Path, histories) -> None:
    base, experts, _ = models.nlg(tmp_path)
    assert nlg_command("construct", tmp_path) == 0
    torch.manual_seed(0)
    for index, task in itertools.product(range(2), ("math", "code")):
        start = torch.randn(20, models.WIDTH) * 0.01
        pretrained, finetuned = (m.model.layers[index].mlp for m in (base, experts[task]))
        losses, best = published_loop(pretrained, finetuned, start, STEPS, 1e-2, whole)
        ours = histories[index][:, ("math", "code").index(task)]
        torch.testing.assert_close(ours.float(), losses, rtol=0, atol=1e-4)
        path = tmp_path / "anchors" / task / NLG_FOLDER / f"dual_anchors_layer_{index + 1}.npy"
        assert (torch.from_numpy(np.load(path)) - best).norm() < 1e-3 * best.norm()


def test_as_published_saves_on_request_only(tmp_path: Path) -> None:
    models.vision(tmp_path, TASKS, save_state_dict)
    assert vision_command("construct", tmp_path, "--as-published") == 0
    assert not (tmp_path / "anchors").exists()
    assert vision_command("construct", tmp_path, "--as-published", "--save_dual_anchors") == 0
    assert len(list((tmp_path / "anchors").rglob("*.npy"))) == 4


def test_token_num_counts_unless_as_published(tmp_path: Path) -> None:
    models.vision(tmp_path, TASKS, save_state_dict)
    path = tmp_path / VISION_FOLDER / "MNIST" / "dual_anchors_layer_1.npy"
    for more, tokens in (
        ((), models.TOKENS),
        (("--token_num", 3), 3),
        (("--token_num", 3, "--as-published", "--save_dual_anchors"), models.TOKENS),
    ):
        assert vision_command("construct", tmp_path, *more) == 0
        assert np.load(path).shape == (tokens, 4, models.WIDTH)


def test_nlg_folder_of_each_script(tmp_path: Path) -> None:
    models.nlg(tmp_path)
    assert nlg_command("construct", tmp_path, "--as-published", "--save_dual_anchors") == 0
    folder = tmp_path / "anchors" / "math"
    assert [path.name for path in folder.iterdir()] == [NLG_FOLDER.replace("-opt-", "-gen-")]
    more = ("--merged_model_path", tmp_path / "math" / "merged", "--adapt_epochs", 1)
    more += ("--save_merged_model_path", tmp_path / "out")
    assert nlg_command("adapt", tmp_path, *more) == 0  # finds -gen- too


def test_resume_keeps_finished_anchors_and_draws_the_same(tmp_path: Path) -> None:
    models.vision(tmp_path, TASKS, save_state_dict)
    name = "init_by_weights"
    assert vision_command("construct", tmp_path, name=name) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "anchors").rglob("*.npy")}
    kept, *lost = sorted(files)
    stamp = kept.stat().st_mtime_ns
    for path in lost:
        path.unlink()
    assert vision_command("construct", tmp_path, "--resume", name=name) == 0
    assert kept.stat().st_mtime_ns == stamp
    for path in lost:
        # Another batch may change the last bits.
        before = np.frombuffer(files[path][128:], np.float32)
        np.testing.assert_allclose(np.load(path).ravel(), before, rtol=1e-4, atol=1e-6)


def test_resume_refuses_other_settings(tmp_path: Path, capsys) -> None:
    models.vision(tmp_path, TASKS, save_state_dict)
    assert vision_command("construct", tmp_path) == 0
    assert vision_command("construct", tmp_path, "--resume", "--anchor_loss", "l1") == 2
    assert "of another command" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [("--position_embeddings",), ("--init_params", "pos")])
def test_nlu_positions_are_added_when_asked_for(tmp_path: Path, histories, flag) -> None:
    base, experts = models.nlu(tmp_path, GLUE)
    assert nlu_command("construct", tmp_path, *flag) == 0
    embedding = experts["cola"].roberta.embeddings.position_embeddings.weight.detach()[:5]
    pretrained, finetuned = (m.roberta.encoder.layer[0] for m in (base, experts["cola"]))
    start = torch.randn(4, 5, models.WIDTH, generator=torch.Generator().manual_seed(0)) * 0.01

    def shifted(layer):
        class Shifted(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                return whole(self.layer(x + embedding))

        return Shifted()

    losses, best = published_loop(
        shifted(pretrained), shifted(finetuned), start, STEPS, 1e-2, whole
    )
    torch.testing.assert_close(histories[0][:, 0].float(), losses, rtol=0, atol=1e-4)
    found = anchorfiles.read(tmp_path / NLU_FOLDER / "cola" / "dual_anchors_layer_1.npy", "nlu")
    assert (found.anchors - (best + embedding)).norm() < 1e-3 * best.norm()


# Random streams ----------------------------------------------------------------------------------


def test_shuffling_is_that_of_a_data_loader() -> None:
    stream = Stream(3)
    order = stream.shuffling(11)
    ours = torch.stack([order(epoch) for epoch in range(1, 4)])
    torch.manual_seed(3)
    loader = torch.utils.data.DataLoader(torch.arange(11), batch_size=4, shuffle=True)
    theirs = torch.stack([torch.cat(list(loader)) for _ in range(3)])
    assert torch.equal(ours, theirs)


def test_too_few_rows_are_padded_with_the_published_midpoints() -> None:
    torch.manual_seed(0)
    layer = ResidualAttentionBlock(16, 32, 2, nn.GELU())
    rows = torch.cat([p.detach() for p in layer.parameters() if p.ndim == 2 and p.shape[1] == 16])
    torch.manual_seed(5)
    padded = [rows]
    for _ in range(10 * 12 - len(rows)):
        i, j = torch.randint(0, len(rows), (2,))
        padded.append((rows[i] + rows[j])[None] / 2)
    expected = torch.cat(padded).reshape(12, 10, 16)
    stream = Stream(5)
    ours = stream.anchors(layer, (10, 12, 16), "weights", 1.0, layout="token_first")
    assert torch.equal(ours.transpose(0, 1), expected)


def test_gaussian_vision_anchors_do_not_depend_on_the_seed() -> None:
    layer = ResidualAttentionBlock(16, 32, 2, nn.GELU())
    draws = [Stream(s).anchors(layer, (2, 3, 16), "gaussian", 1.0, reseed=0) for s in (0, 7)]
    assert torch.equal(*draws)
    draws = [Stream(s).anchors(layer, (2, 3, 16), "gaussian", 1.0) for s in (0, 7)]
    assert not torch.equal(*draws)


# Flags and folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", flags.MODALITIES)
@pytest.mark.parametrize("command", flags.COMMANDS)
def test_defaults_are_the_published_ones(modality: str, command: str) -> None:
    line = ["--model", "roberta-base"] if modality == "nlu" else []
    args = flags.parse(modality, command, line)
    construct = command == "construct"
    if modality == "nlg":
        expected = {"name": "init_by_params", "anchor_num": 1024, "opt_lr": 0.01}
        expected |= {"opt_steps": 1 if construct else 200, "scale": 1 if construct else 0.01}
        if not construct:
            expected |= {"adapt_batch_size": 1024, "adapt_epochs": 10, "adapt_loss": "cos"}
    else:
        expected = {"name": "init_by_gauss_random", "anchor_num": 64, "opt_steps": 800}
        expected |= {"scale": 1, "adapt_epochs": 500, "adapt_lr": 0.01, "adapt_loss": "mse"}
        expected |= {"token_num": 50 if modality == "vision" else 5, "adapt_batch_size": 128}
        expected |= {"alpha": 0.4, "anchor_loss": "cos", "init_params": "pretrained", "seed": 0}
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.given == ({"model"} if modality == "nlu" else set())


def parsed(line: str) -> argparse.Namespace:
    modality, command, *rest = line.split()
    return flags.parse(modality, command, rest)


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        # From the published shell scripts.
        (
            "vision construct --model ViT-B-32 --name init_by_gauss_random --scale 0.01"
            " --opt_steps 1200 --opt_lr 1e-2",
            "ViT-B-32/init_by_gauss_random-anchor-64-scale-0.01-opt-1200-0.01",
        ),
        (
            "vision construct --model ViT-B-32 --name init_by_weights --scale 0.01"
            " --opt_steps 1200 --opt_lr 1e-2",
            "ViT-B-32/init_by_weights-anchor-64-scale-1.0-opt-1200-0.01",
        ),
        ("vision construct", "ViT-B-32/init_by_gauss_random-anchor-64-scale-1-opt-800-0.01"),
        (
            "nlu construct --model roberta-large --name init_by_weights_pos --scale 0.01"
            " --opt_steps 1200",
            "roberta-large/init_by_weights_pos-anchor-64-scale-1.0-opt-1200-0.01",
        ),
    ],
)
def test_anchor_folders(line: str, folder: str) -> None:
    args = parsed(line)
    assert folders.anchors_folder(args, "root") == Path("root", folder)
    path = folders.anchors_file(args, "root", "task", 0)
    assert path == Path("root", folder, "task", "dual_anchors_layer_1.npy")


def test_merged_folders() -> None:
    args = parsed(
        "vision adapt --model ViT-B-32 --scale 0.01 --adapt_epochs 100 --adapt_lr 1e-5"
        " --adapt_loss cos --model_location m"
    )
    run = "anchor-64-scale-0.01-adapt-100-1e-05-128-cos"
    assert folders.merged_folder(args) == Path("m/ViT-B-32/ViT-B-32/init_by_gauss_random", run)
    args = parsed(
        "nlu adapt --model roberta-base --name init_by_weights_pos --adapt_epochs 125"
        " --adapt_lr 5e-5 --model_location m"
    )
    run = "anchor-64-scale-1.0-adapt-125-5e-05-128-mse"
    assert folders.merged_folder(args) == Path("m/roberta-base/init_by_weights_pos", run)
    args = parsed(
        "nlg adapt --name init_by_weights --gen_steps 200 --gen_lr 1e-2 --anchor_num 8192"
        " --do_math --do_code --adapt_batch_size 8192 --adapt_epochs 50"
        " --save_merged_model_path m"
    )
    run = "Llama-2-13b-hf-opt-200-opt-lr-0.01-anchor-8192-adapt-50-lr-0.01-bs-8192"
    expected = Path("m/math_code/init_by_weights-scale-0.01", run)
    assert folders.merged_folder(args) == expected


def test_tasks_and_their_order() -> None:
    assert folders.tasks(parsed("vision construct"))[:2] == ["MNIST", "EuroSAT"]
    assert folders.tasks(parsed("nlu construct --model r"))[3] == "stsb"
    assert folders.tasks(parsed("nlg construct --do_code --do_math")) == ["math", "code"]
    instruct = "nlg construct --do_instruct --do_math"
    assert folders.tasks(parsed(instruct)) == ["math", "instruct"]
    assert folders.tasks(parsed(f"{instruct} --as-published")) == ["math"]
    with pytest.raises(InputError, match="--do_math"):
        folders.tasks(parsed("nlg construct"))


@pytest.mark.parametrize(
    "line",
    ["vision construct --name init_by_params", "nlu construct --model r --name init_by_params"],
)
def test_names_that_the_scripts_refuse(line: str) -> None:
    with pytest.raises(InputError, match="init_by_weights"):
        folders.scheme(parsed(line))


def test_bad_lines_end_with_a_sentence(tmp_path: Path, capsys) -> None:
    for line, code in (([], 2), (["vision"], 2), (["--help"], 0), (["vision", "-h"], 0)):
        assert main(line) == code
        said = capsys.readouterr()
        assert (said.out if code == 0 else said.err).startswith("usage: fda-fast official")
        assert not (said.err if code == 0 else said.out)
    assert main(["vision", "merge"]) == 2
    assert "construct | adapt" in capsys.readouterr().err
    assert main(["vision", "construct", "--model_location", str(tmp_path)]) == 2
    assert "zeroshot" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["vision", "construct", "--no_such_flag"])


# The call in place of the loop --------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cos", "mse", "l1"])
def test_optimise_takes_the_vision_layout(loss: str) -> None:
    torch.manual_seed(0)
    pretrained = models.finetuned(models.Block(), 0.1)
    finetuned = models.finetuned(pretrained)
    x = torch.randn(models.TOKENS, 4, models.WIDTH).requires_grad_()
    found = optimise(pretrained, finetuned, x, STEPS, 1e-2, loss, progress=False)
    losses, best = published_loop(
        pretrained, finetuned, x.detach(), STEPS, 1e-2, anchors_first, loss
    )
    torch.testing.assert_close(found.losses.float(), losses, rtol=0, atol=1e-4)
    assert (found.best_X - best).norm() < 1e-3 * best.norm()
    assert found.best_loss == pytest.approx(losses.min().item(), abs=1e-4)
    torch.testing.assert_close(found.gt, finetuned(found.best_X).detach())


def test_optimise_refuses_an_unknown_loss() -> None:
    block = models.Block()
    with pytest.raises(InputError, match="cos"):
        optimise(block, block, torch.zeros(2, 2, models.WIDTH), 1, 1e-2, "cosine")
