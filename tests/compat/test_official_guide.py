"""The examples of docs/official.md, and the command lines of the published shell scripts."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from fda_fast.compat.official import flags, folders

from . import official_models as models

GUIDE = (Path(__file__).parents[2] / "docs" / "official.md").read_text()
COMMANDS = re.findall(r"^fda-fast official (.+)$", GUIDE, re.M)
PUBLISHED = {
    # Script, and every flag that its shell script passes.
    "vision construct": "--model ViT-B-32 --name init_by_weights --scale 0.01 --anchor_num 64"
    " --token_num 50 --opt_steps 1200 --opt_lr 1e-2 --anchor_loss cos --save_dual_anchors",
    "vision adapt": "--model ViT-B-32 --name init_by_gauss_random --init_params pretrained"
    " --scale 0.01 --anchor_num 64 --token_num 50 --opt_steps 1200 --opt_lr 1e-2 --anchor_loss cos"
    " --adapt_loss cos --read_anchors_path a --adapt_batch_size 128 --adapt_epochs 100"
    " --adapt_lr 1e-5",
    "nlu construct": "--model roberta-large --name init_by_weights_pos --scale 0.01"
    " --anchor_num 64 --token_num 5 --opt_steps 1200 --opt_lr 1e-2 --model_location m"
    " --anchor_loss cos --save_dual_anchors",
    "nlu adapt": "--model roberta-base --name init_by_gauss_random_pos --init_params tsv"
    " --scale 0.01 --anchor_num 64 --token_num 5 --opt_steps 1200 --opt_lr 1e-2 --anchor_loss cos"
    " --save_dual_anchors --adapt_lr 1e-2 --adapt_loss mse --adapt_epochs 100",
    "nlg construct": "--name init_by_gauss_random --scale 0.01 --anchor_num 8192 --gen_steps 200"
    " --random --gen_lr 1e-2 --save_dual_anchors --do_math --do_code",
    "nlg adapt": "--name init_by_weights --scale 0.01 --anchor_num 8192 --gen_steps 200"
    " --gen_lr 1e-2 --do_math --do_code --adapt_lr 1e-2 --merged_model_path math/merged"
    " --adapt_batch_size 8192 --adapt_epochs 50",
}


def test_guide_has_an_example_of_every_command() -> None:
    found = {" ".join(line.split()[:2]) for line in COMMANDS}
    assert found == {f"{m} {c}" for m in flags.MODALITIES for c in flags.COMMANDS}


@pytest.mark.parametrize("line", [*COMMANDS, *(f"{k} {v}" for k, v in PUBLISHED.items())])
def test_lines_are_taken(line: str) -> None:
    modality, command, *rest = line.split()
    args = flags.parse(modality, command, rest)
    task = folders.tasks(args)[0]
    folders.scheme(args)
    assert folders.anchors_file(args, "root", task, 0).suffix == ".npy"
    if command == "adapt":
        folders.merged_folder(args)


def test_adapt_examples_read_what_construct_examples_write() -> None:
    for construct, adapt in zip(COMMANDS[::2], COMMANDS[1::2], strict=True):
        pair = [flags.parse(*line.split()[:2], line.split()[2:]) for line in (construct, adapt)]
        files = [folders.anchors_file(args, "anchors", "task", 3) for args in pair]
        assert files[0] == files[1]


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.+?)```", GUIDE, re.S)
    torch.manual_seed(0)
    pretrained = models.finetuned(models.Block(), 0.1)
    scope = {
        "pretrained_layer": pretrained,
        "finetuned_layer": models.finetuned(pretrained),
        "X": torch.randn(models.TOKENS, 4, models.WIDTH, requires_grad=True),
        "args": Namespace(opt_steps=3, opt_lr=1e-2, anchor_loss="cos"),
    }
    exec(code, scope)
    assert scope["best_X"].shape == scope["gt"].shape == scope["X"].shape
    assert not torch.equal(scope["best_X"], scope["X"])


def test_guide_names_every_flag_of_ours() -> None:
    args = flags.parse("vision", "adapt", [])
    nlu = flags.parse("nlu", "construct", ["--model", "m"])
    published = {
        *("seed", "name", "model", "init_params", "data_location", "model_location"),
        *("read_anchors_path", "anchor_num", "token_num", "anchor_loss", "opt_steps", "opt_lr"),
        *("scale", "adapt_batch_size", "adapt_epochs", "adapt_lr", "adapt_loss", "alpha"),
        *("save_model", "save_dual_anchors", "save_anchors_path", "save_merged_model_path"),
    }
    ours = (vars(args).keys() | vars(nlu).keys()) - published - {"given", "modality", "command"}
    missing = [name for name in ours if f"--{name.replace('as_p', 'as-p')}" not in GUIDE]
    assert not missing
