"""The flags of the published scripts, with their defaults, and a few that they lack.

Names, types and defaults are those of the published ``fda_args.py`` (Vision, NLU) and of the
parsers in NLG's ``construct_fda.py`` and ``adapt.py``. A default of the wrong type there (the
integer 1 for a scale) is kept: it decides the folder's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

MODALITIES = ("vision", "nlu", "nlg")
COMMANDS = ("construct", "adapt")
LOSSES = {"cos": "cosine", "mse": "l2", "l1": "l1"}
"""Their names of the distances, and ours."""

# Where the authors keep things: the scripts' defaults, or literals inside the NLG scripts.
_HOME, _DATA = "/home/shikexuan", "/data/shikexuan"


def parse(modality: str, command: str, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of one command.

    Args:
        modality: "vision", "nlu" or "nlg".
        command: "construct" or "adapt".
        argv: the arguments behind these two words.

    Returns:
        The published names, and ours: ``as_published``, ``resume``, ``device``, ``engine``,
        ``precision``, ``quiet``, ``tasks``; ``given`` is the set of flags that were on the line.

    Raises:
        SystemExit: as argparse does: 2 for a bad line, 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog=f"fda-fast official {modality} {command}",
        description=f"In place of the published {modality} script {_SCRIPT[command]}.",
    )
    parser.register("action", None, _Noted)
    if modality == "nlg":
        _nlg(parser, command)
    else:
        _encoder(parser, modality)
    _ours(parser)
    namespace = parser.parse_args(argv, argparse.Namespace(given=set()))
    namespace.modality, namespace.command = modality, command
    return namespace


_SCRIPT = {"construct": "construct_fda.py", "adapt": "adapt.py"}


class _Noted(argparse._StoreAction):
    """Stores a value, and that it was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        super().__call__(parser, namespace, values, option)
        namespace.given.add(self.dest)


def _encoder(parser: argparse.ArgumentParser, modality: str) -> None:
    vision = modality == "vision"
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of weight rows and shuffling")
    add(
        "--name",
        default="init_by_gauss_random",
        help="first anchors: init_by_gauss_random or init_by_weights, for nlu also with _pos",
    )
    add(
        "--model",
        default="ViT-B-32" if vision else None,
        required=not vision,
        help="folder below --model_location: "
        + ("ViT-B-32, ViT-B-16, ViT-L-14" if vision else "roberta-base, roberta-large"),
    )
    add("--init_params", default="pretrained", help="start of adapt: pretrained, ta, tsv, wudi")
    add("--data_location", default=f"{_DATA}/data_cv", help="of evaluation: not used here")
    add(
        "--model_location",
        default=_DATA if vision else f"{_DATA}/nlu_finetuned_models",
        help="folder of the checkpoints",
    )
    add("--read_anchors_path", default=f"{_DATA}/dual_anchors_5880", help="anchors for adapt")
    add("--anchor_num", type=int, default=64, help="anchors per layer and task")
    add("--token_num", type=int, default=50 if vision else 5, help="tokens per anchor")
    add("--anchor_loss", default="cos", choices=LOSSES, help="distance in construction")
    add("--opt_steps", type=int, default=800, help="construction steps (the paper: 1200)")
    add("--opt_lr", type=float, default=1e-2, help="construction learning rate")
    add("--scale", type=float, default=1, help="sigma of Gaussian anchors (the paper: 0.01)")
    add("--adapt_batch_size", type=int, default=128, help="anchors per adaptation step")
    add("--adapt_epochs", type=int, default=500, help="adaptation epochs (the paper: 15 to 100)")
    add("--adapt_lr", type=float, default=1e-2, help="adaptation learning rate")
    add("--adapt_loss", default="mse", choices=LOSSES, help="distance in adaptation")
    add("--alpha", type=float, default=0.4, help="coefficient of --init_params ta")
    add("--save_model", action="store_true", help="no effect, as published")
    add("--save_dual_anchors", action="store_true", help="only matters with --as-published")
    add("--save_anchors_path", default=f"{_DATA}/dual_anchors_5880", help="where construct writes")
    add("--save_merged_model_path", default=f"{_DATA}/merged_models", help="not used, as published")
    if vision:
        add("--head_width", type=int, help="width of an attention head, for bare tensors [ours]")
        add(
            "--activation",
            choices=("quick_gelu", "gelu"),
            help="of open_clip blocks, for bare tensors [ours]",
        )
    else:
        add(
            "--position_embeddings",
            action="store_true",
            help="add position embeddings to the anchors, which _pos in --name does not [ours]",
        )


def _nlg(parser: argparse.ArgumentParser, command: str) -> None:
    construct = command == "construct"
    add = parser.add_argument
    add("--do_math", action="store_true", help="merge the math model")
    add("--do_code", action="store_true", help="merge the code model")
    add("--do_instruct", action="store_true", help="merge the instruct model")
    add("--save_dual_anchors", action="store_true", help="only matters with --as-published")
    add("--language_model_name", default="Llama-2-13b-hf", help="the pretrained model's folder")
    add("--name", default="init_by_params", help="first anchors: Gaussian if it has 'random'")
    # One script says gen where the other says opt; here both take both.
    add("--opt_steps", "--gen_steps", type=int, default=1 if construct else 200, help="steps")
    add("--opt_lr", "--gen_lr", type=float, default=1e-2, help="construction learning rate")
    add("--anchor_num", type=int, default=1024, help="vectors per layer and task")
    add("--scale", type=float, default=1 if construct else 0.01, help="sigma of Gaussian anchors")
    add("--gpu", type=int, default=0, help="CUDA device, negative for the CPU")
    if not construct:
        add(
            "--merged_model_path",
            default=f"{_DATA}/save_merged_models_dare/math_code/math/mask_merging/"
            "task_arithmetic_scaling_coefficient_0.5/mask_0.9_0.9_rescale_True",
            help="the merged model to start from",
        )
        add("--adapt_batch_size", type=int, default=1024, help="vectors per adaptation step")
        add("--adapt_epochs", type=int, default=10, help="adaptation epochs")
        add("--adapt_loss", default="cos", choices=LOSSES, help="distance in adaptation")
        add("--adapt_lr", type=float, default=1e-2, help="adaptation learning rate")
        add("--merging_method_name", default="sequential_efficient", help="no effect, as published")
    for flag, kind, default in (
        ("--val_shot", int, 32),
        ("--batch_size", int, 32),
        ("--tag", str, "test"),
        ("--lr", float, 0.1),
        ("--epochs", int, 100),
        ("--llm_version", str, "v1.0"),
    ):
        add(flag, type=kind, default=default, help="no effect, as published")
    add("--random", action="store_true", help="no effect, as published")
    ours = parser.add_argument_group("paths that the published scripts hold as literals")
    ours.add_argument(
        "--model_location", default=f"{_HOME}/MergeLM_models", help="folder of the checkpoints"
    )
    anchors = "--save_anchors_path" if construct else "--read_anchors_path"
    ours.add_argument(anchors, default=f"{_HOME}/dual_anchors", help="folder of the anchors")
    if not construct:
        ours.add_argument(
            "--save_merged_model_path",
            default=f"{_DATA}/save_merge_models",
            help="where the merged model goes",
        )


def _ours(parser: argparse.ArgumentParser) -> None:
    ours = parser.add_argument_group("not in the published scripts")
    add = ours.add_argument
    add(
        "--as-published",
        action="store_true",
        help="keep the quirks that are mended by default (docs/official.md)",
    )
    add("--tasks", nargs="+", help="the tasks, in place of the published ones")
    add("--resume", action="store_true", help="keep anchors that an earlier run finished")
    add("--device", help="auto, cpu, cuda or cuda:N; default: as the script chooses")
    add("--engine", choices=("auto", "program", "autograd"), default="auto", help="of the layers")
    add(
        "--precision",
        choices=("auto", "fp32", "tf32", "bf16"),
        help="of products; default auto, with --as-published fp32",
    )
    add("--quiet", action="store_true", help="print errors only")
