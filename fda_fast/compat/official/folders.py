"""The published folder grammar: where anchors, merged models and settings files are."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Literal

from fda_fast.errors import InputError

VISION_TASKS = ("MNIST", "EuroSAT", "GTSRB", "SVHN", "DTD", "RESISC45", "Cars", "SUN397")
NLU_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
NLG_MODELS = {
    "instruct": "WizardLM-13B-V1.2",
    "math": "WizardMath-13B-V1.0",
    "code": "llama-2-13b-code-alpaca",
}
"""Folders of the NLG experts by task."""

Scheme = Literal["weights", "gaussian"]


def tasks(args: Namespace) -> list[str]:
    """The tasks, in the order in which the published loops visit them.

    Raises:
        InputError: NLG without one ``--do_`` flag.
    """
    if args.tasks:
        return list(args.tasks)
    if args.modality != "nlg":
        return list(VISION_TASKS if args.modality == "vision" else NLU_TASKS)
    # The scripts take --do_instruct and then leave the model out.
    asked = {"math": args.do_math, "code": args.do_code}
    asked["instruct"] = args.do_instruct and not args.as_published
    found = [task for task, wanted in asked.items() if wanted]
    if not found:
        raise InputError("tasks", expected="--do_math, --do_code or --do_instruct", got="none")
    return found


def scheme(args: Namespace) -> Scheme:
    """How first anchors are made, by ``--name`` and the modality's rule for it.

    Raises:
        InputError: a name that the published script refuses.
    """
    name = args.name
    if args.modality == "nlg":
        return "gaussian" if "random" in name else "weights"
    if args.modality == "vision":
        known = name in ("init_by_weights", "init_by_gauss_random")
    else:
        known = "weights" in name or "random" in name
    if not known:
        raise InputError("--name", expected="init_by_weights or init_by_gauss_random", got=name)
    return "weights" if "weights" in name else "gaussian"


def anchors_folder(args: Namespace, root: str | Path) -> Path:
    """Folder of all anchors of a Vision or NLU run below ``root``; it holds a folder per task."""
    return Path(root) / args.model / f"{_made(args)}-opt-{args.opt_steps}-{args.opt_lr}"


def anchors_file(args: Namespace, root: str | Path, task: str, layer: int) -> Path:
    """The file of one (task, layer), layers counted from 0 here and from 1 in the name.

    NLG's construct names its folders ``-gen-`` and its adapt looks for ``-opt-``: written is the
    latter, with ``--as-published`` the former; read is whichever there is.
    """
    file = f"dual_anchors_layer_{layer + 1}.npy"
    if args.modality != "nlg":
        return anchors_folder(args, root) / task / file
    found = [
        Path(root)
        / task
        / f"{args.name}-scale-{args.scale}-{word}-{args.opt_steps}-lr-{args.opt_lr}"
        f"-anchor-{args.anchor_num}" / file
        for word in ("opt", "gen")
    ]
    if args.command == "construct":
        return found[1] if args.as_published else found[0]
    return next((path for path in found if path.exists()), found[0])


def merged_folder(args: Namespace) -> Path:
    """The folder that adapt writes to."""
    if args.modality == "nlg":
        run = (
            f"{args.language_model_name}-opt-{args.opt_steps}-opt-lr-{args.opt_lr}"
            f"-anchor-{args.anchor_num}-adapt-{args.adapt_epochs}-lr-{args.adapt_lr}"
            f"-bs-{args.adapt_batch_size}"
        )
        together = "_".join(tasks(args))
        return (
            Path(args.save_merged_model_path) / together / f"{args.name}-scale-{args.scale}" / run
        )
    run = (
        f"anchor-{args.anchor_num}-scale-{_scale(args)}-adapt-{args.adapt_epochs}-{args.adapt_lr}"
        f"-{args.adapt_batch_size}-{args.adapt_loss}"
    )
    # The Vision script appends the model to --model_location, and then once more.
    twice = [args.model] if args.modality == "vision" else []
    return Path(args.model_location, args.model, *twice, args.name, run)


def write_settings(path: Path, args: Namespace) -> None:
    """Write every published flag, one a line, sorted: the same command gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(settings_text(args))
    os.replace(partial, path)


def settings_text(args: Namespace) -> str:
    """What ``write_settings`` writes: the flags that decide the numbers, not where they run."""
    left_out = {"given", "device", "quiet", "resume", "gpu", "engine", "precision"}
    return "".join(
        f"{name} = {value}\n" for name, value in sorted(vars(args).items()) if name not in left_out
    )


def _made(args: Namespace) -> str:
    return f"{args.name}-anchor-{args.anchor_num}-scale-{_scale(args)}"


def _scale(args: Namespace) -> str:
    # Weight rows are not scaled, whatever --scale says, and the folders say so.
    return "1.0" if scheme(args) == "weights" else str(args.scale)
