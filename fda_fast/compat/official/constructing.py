"""The published construct commands: anchors of every layer and task, into their folders."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fda_fast.compat.official import anchorfiles, folders
from fda_fast.compat.official.flags import LOSSES
from fda_fast.compat.official.models import HuggingFace, Models, open_models
from fda_fast.compat.official.streams import Stream
from fda_fast.construct import construct
from fda_fast.errors import InputError
from fda_fast.job import free_memory, groups_of
from fda_fast.layers.call import call_layer
from fda_fast.layerwork import is_unchanged

SETTINGS = "construct_settings.text"
VISION_TOKENS = {"ViT-B-32": 50, "ViT-B-16": 197, "ViT-L-14": 257}
"""Tokens of an image, for encoders that come without their position embeddings."""


def run(args: Namespace, device: torch.device, say: Callable[[str], None]) -> None:
    """Construct all anchors that the flags ask for.

    Args:
        args: from ``flags.parse``.
        device: where to compute.
        say: takes a line of progress.

    Raises:
        InputError: anything about flags, folders or checkpoints that cannot be used.
        OSError: a file that cannot be written.
    """
    first = folders.scheme(args)
    models = open_models(args, device)
    shape = anchor_shape(args, models, say)
    root = Path(args.save_anchors_path)
    saves = args.save_dual_anchors or not args.as_published
    if saves:
        _settings(args, root)
    else:
        say("nothing will be saved: --as-published without --save_dual_anchors")
    stream = Stream(0 if args.modality == "nlg" else args.seed, device)
    classifier = models.lacking_classifier() if isinstance(models, HuggingFace) else None
    for index in range(models.n_layers):
        pretrained, finetuned = models.read(index)
        starts = {}
        for task in models.tasks:
            if classifier is not None:
                stream.classifier(*classifier)
            starts[task] = stream.anchors(
                finetuned[task],
                shape,
                first,
                args.scale,
                layout="token_first" if args.modality == "vision" else "anchor_first",
                reseed=0 if args.modality == "vision" else None,
            )
        paths = {task: folders.anchors_file(args, root, task, index) for task in models.tasks}
        wanted = [task for task in models.tasks if not (args.resume and paths[task].exists())]
        offsets = _positions(args, models, shape)
        for group in groups_of(wanted, _tasks_at_once(pretrained, shape, device, offsets)):
            begun = time.monotonic()
            made = _construct(args, pretrained, finetuned, starts, offsets, group)
            seconds = (time.monotonic() - begun) / len(group)
            for task in group:
                best, loss, last = made[task]
                if saves:
                    anchorfiles.write(paths[task], best, finetuned[task], args.modality)
                terms = _divisor(args, pretrained)
                say(
                    f"layer {index + 1}/{models.n_layers} {task}: angle_Loss {last / terms:.4f}, "
                    f"best {loss / terms:.4f}, {seconds:.1f} s"
                )


def anchor_shape(args: Namespace, models: Models, say: Callable[[str], None]) -> tuple[int, ...]:
    """[n, T, d] or [n, d] of one (layer, task).

    The Vision script takes T from the model's name, which says how many tokens an image has. Here
    the checkpoint says it, and a given ``--token_num`` counts.
    """
    if args.modality == "nlg":
        return (args.anchor_num, models.width)
    tokens = args.token_num
    if args.modality == "vision":
        published = models.tokens or VISION_TOKENS.get(args.model, tokens)
        if args.as_published or "token_num" not in args.given:
            tokens = published
        if tokens != published:
            say(
                f"{tokens} tokens as --token_num says; the published script takes the {published} "
                "of an image all the same (--as-published)"
            )
    return (args.anchor_num, tokens, models.width)


def _settings(args: Namespace, root: Path) -> None:
    """Write the settings file; with --resume hold the one that is there against the flags."""
    if args.modality == "nlg":
        return  # as published: NLG folders hold anchors only
    path = folders.anchors_folder(args, root) / SETTINGS
    if args.resume and path.exists() and path.read_text() != folders.settings_text(args):
        raise InputError(
            f"--resume: {path} is of another command",
            expected="the same flags",
            got="others",
            fix="Give the flags of the first run, or leave --resume out to begin again",
        )
    folders.write_settings(path, args)


def _positions(args: Namespace, models: Models, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Position embeddings [T, d] by task, where they are asked for; else nothing."""
    if args.modality != "nlu":
        return {}
    # "pos" in --init_params is what the published code looks at; its scripts put it into --name.
    if not (args.position_embeddings or "pos" in args.init_params):
        return {}
    assert isinstance(models, HuggingFace)
    return {task: models.position_embeddings(task, shape[1]) for task in models.tasks}


class _Shifted(nn.Module):
    """A layer behind constant position embeddings: x -> layer(x + positions)."""

    def __init__(self, layer: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.layer, self._positions = layer, positions

    def forward(self, x: Tensor) -> Tensor:
        """[n, T, d] -> [n, T, d]."""
        return call_layer(self.layer, x + self._positions)


def _construct(
    args: Namespace,
    pretrained: nn.Module,
    finetuned: Mapping[str, nn.Module],
    starts: Mapping[str, Tensor],
    offsets: Mapping[str, Tensor],
    group: list[str],
) -> dict[str, tuple[Tensor, float, float]]:
    """(best anchors, their loss, loss of the last step) by task of the group."""
    made = {}
    moving = []
    for task in group:
        if is_unchanged(pretrained, finetuned[task]):
            # No task vector, so every cosine is 0 and the loop keeps its first anchors.
            count = float(len(list(pretrained.parameters())))
            shift = offsets.get(task, torch.zeros(()).to(starts[task]))
            made[task] = (starts[task] + shift, count, count)
        else:
            moving.append(task)
    if not moving:
        return made
    base, layers = pretrained, [finetuned[task] for task in moving]
    if offsets:
        base = _Shifted(pretrained, offsets[moving[0]])
        layers = [_Shifted(finetuned[task], offsets[task]) for task in moving]
    found = construct(
        base,
        layers,
        [starts[task] for task in moving],
        steps=args.opt_steps,
        lr=args.opt_lr,
        distance="cosine" if args.modality == "nlg" else LOSSES[args.anchor_loss],
        engine="autograd" if offsets else args.engine,
        precision=args.precision,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    assert isinstance(found.loss, list)
    for i, task in enumerate(moving):
        best = found.anchors[i] + offsets[task] if offsets else found.anchors[i]
        made[task] = (best, found.loss[i], found.history[-1, i].item())
    return made


def _divisor(args: Namespace, layer: nn.Module) -> int:
    """What the printed loss is divided by: the parameter tensors; the NLU script says 12."""
    if args.as_published and args.modality == "nlu":
        return 12
    return len(list(layer.parameters()))


def _tasks_at_once(
    layer: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    offsets: Mapping[str, Tensor],
) -> int:
    """How many tasks fit into half of the free memory; 1 with position embeddings, which differ."""
    if offsets:
        return 1
    elements = sum(p.numel() for p in layer.parameters())
    rows = shape[0] * (shape[1] if len(shape) == 3 else 1)
    # Task vectors, gradients and fine-tuned weights; some 60 values per row and column of anchors.
    per_task = 4 * (4 * elements + 60 * rows * shape[-1])
    return max(1, free_memory(device) // 2 // per_task)
