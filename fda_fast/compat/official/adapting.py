"""The published adapt commands: anchors read, every layer fitted, the merged model written."""

from __future__ import annotations

import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fda_fast.adapt import adapt
from fda_fast.checkpoints.outputs import check_output
from fda_fast.compat.official import anchorfiles, folders, published
from fda_fast.compat.official.anchorfiles import AnchorFile
from fda_fast.compat.official.flags import LOSSES
from fda_fast.compat.official.models import (
    HuggingFace,
    HuggingFaceWriter,
    Models,
    locate,
    open_models,
)
from fda_fast.compat.official.openclip import OpenClip, OpenClipWriter
from fda_fast.compat.official.streams import Stream
from fda_fast.errors import InputError
from fda_fast.layers.call import call_layer
from fda_fast.presets import Start, get_preset
from fda_fast.starting import merge_tensor

SETTINGS = "adaptation_settings.text"
_STARTS: dict[str, Start] = {"ta": "task_arithmetic", "tsv": "tsv", "wudi": "wudi"}
_ALPHA = {"roberta-large": 0.2}
# Stored targets were computed by another torch, perhaps on another device: rounding, not weights.
_TARGET_TOLERANCE = 1e-2


def run(args: Namespace, device: torch.device, say: Callable[[str], None]) -> list[Path]:
    """Adapt every layer to the anchors and write the merged model.

    Args:
        args: from ``flags.parse``.
        device: where to compute.
        say: takes a line of progress.

    Returns:
        What was written.

    Raises:
        InputError: anything about flags, anchors or checkpoints that cannot be used.
        RuntimeError: the adaptation loss stopped being finite.
        OSError: a file that cannot be written.
    """
    _check(args)
    models = open_models(args, device)
    folder = folders.merged_folder(args)
    for index in range(models.n_layers):
        for task in models.tasks:
            path = folders.anchors_file(args, args.read_anchors_path, task, index)
            anchorfiles.check_present(path)
    merged = _merged_model(args, models, say)
    writer = _writer(args, models, folder)
    if args.modality != "nlg":
        folders.write_settings(folder / SETTINGS, args)
    stream = Stream(0 if args.modality == "nlg" else args.seed, device)
    # In NLU the scripts load the pretrained model once, and from a merged start for each layer.
    classifier = models.lacking_classifier() if isinstance(models, HuggingFace) else None
    if classifier is not None:
        stream.classifier(*classifier)
    try:
        for index in range(models.n_layers):
            begun = time.monotonic()
            pretrained, finetuned = models.read(index)
            files = _read_anchors(args, models, index, finetuned)
            if classifier is not None and args.init_params != "pretrained":
                stream.classifier(*classifier)
            start = _start(args, models, index, pretrained, finetuned, merged)
            layer, history = _fit(args, pretrained, finetuned, files, start, stream)
            writer.add(index, dict(layer.named_parameters()))
            say(
                f"layer {index + 1}/{models.n_layers}: loss of an anchor {history[0]:.4f} -> "
                f"{history[-1]:.4f}, {time.monotonic() - begun:.1f} s"
            )
        written = writer.finish()
    finally:
        writer.close()
    if args.modality == "nlg":
        written += _second_copy(args, written[0])
    return written


def _check(args: Namespace) -> None:
    if args.modality == "nlg":
        return
    folders.scheme(args)
    if args.init_params not in ("pretrained", *_STARTS):
        raise InputError(
            "--init_params", expected="pretrained, ta, tsv or wudi", got=args.init_params
        )
    anchors = args.anchor_num * len(folders.tasks(args))
    if args.modality == "vision" and args.as_published and anchors % args.adapt_batch_size:
        raise InputError(
            f"--as-published: {anchors} anchors in batches of {args.adapt_batch_size}",
            expected="a divisor",
            fix="The published script then mixes up its rows or stops; here leave the flag out",
        )


def _writer(
    args: Namespace, models: OpenClip | HuggingFace, folder: Path
) -> OpenClipWriter | HuggingFaceWriter:
    if args.modality == "nlg":
        assert isinstance(models, HuggingFace)
        check_output(folder / "code")
        return HuggingFaceWriter(folder / "math", models, _merged_path(args))
    stem = f"merged_model_by_{args.init_params}"
    if isinstance(models, OpenClip):
        return OpenClipWriter(folder, stem, models)
    return HuggingFaceWriter(folder / stem, models)


def _merged_path(args: Namespace) -> Path:
    return locate(Path(args.merged_model_path), "the merged model", "--merged_model_path")


def _merged_model(
    args: Namespace, models: OpenClip | HuggingFace, say: Callable[[str], None]
) -> Path | None:
    """Where the merged model is that adaptation starts from; None where it is computed here."""
    if args.modality == "nlg":
        return _merged_path(args)
    if args.init_params not in ("tsv", "wudi"):
        return None
    stem = Path(args.model_location) / args.model / f"merged_{args.init_params}"
    try:
        return locate(stem, f"the {args.init_params} model", "--model_location")
    except InputError:
        if args.as_published:
            raise  # no published script writes it
    say(f"no {stem.name} in {stem.parent}: merged here, layer by layer")
    return None


def _start(
    args: Namespace,
    models: Models,
    index: int,
    pretrained: nn.Module,
    finetuned: Mapping[str, nn.Module],
    merged: Path | None,
) -> list[tuple[nn.Module | Mapping[str, Tensor], float]] | None:
    """Where a layer's adaptation begins, as ``fda_fast.adapt`` takes it."""
    if merged is not None:
        return [(models.read_merged(merged, index), 1.0)]
    if args.init_params == "pretrained":
        return None
    if args.init_params == "ta":
        alpha = _ALPHA.get(args.model, 0.3)
        if "alpha" in args.given and not args.as_published:
            alpha = args.alpha
        return [(layer, alpha) for layer in finetuned.values()]
    vision = args.modality == "vision"
    method = _STARTS[args.init_params]
    assert method != "pretrained"
    settings = get_preset("vit-b-32" if vision else "roberta-base").start(method)
    names = models.global_names(index)
    layers = [dict(layer.named_parameters()) for layer in finetuned.values()]
    with torch.no_grad():
        weights = {
            local: merge_tensor(
                method,
                names[local],
                parameter.detach(),
                [layer[local].detach() - parameter.detach() for layer in layers],
                scaling=settings.scaling,
                rules=settings.rules,
                steps=settings.steps,
                lr=settings.lr,
            )
            for local, parameter in pretrained.named_parameters()
        }
    return [(weights, 1.0)]


def _read_anchors(
    args: Namespace, models: Models, index: int, finetuned: Mapping[str, nn.Module]
) -> dict[str, AnchorFile]:
    found = {}
    for task in models.tasks:
        path = folders.anchors_file(args, args.read_anchors_path, task, index)
        file = anchorfiles.read(path, args.modality)
        if file.anchors.shape[-1] != models.width:
            raise InputError(
                f"anchors file {path}: width", expected=models.width, got=file.anchors.shape[-1]
            )
        found[task] = file.to(next(finetuned[task].parameters()).device)
    return found


def _fit(
    args: Namespace,
    pretrained: nn.Module,
    finetuned: Mapping[str, nn.Module],
    files: Mapping[str, AnchorFile],
    start: list[tuple[nn.Module | Mapping[str, Tensor], float]] | None,
    stream: Stream,
) -> tuple[nn.Module, Tensor]:
    """The merged layer and its mean loss by epoch."""
    order = stream.shuffling(sum(len(file.anchors) for file in files.values()))
    if args.as_published and args.modality == "nlu":
        return published.adapt(
            pretrained,
            torch.cat([file.anchors for file in files.values()]),
            torch.cat([_stored(file) for file in files.values()]),
            start,
            epochs=args.adapt_epochs,
            lr=args.adapt_lr,
            batch_size=args.adapt_batch_size,
            loss=args.adapt_loss,
            order=order,
        )
    for task, file in files.items():
        _check_targets(file, finetuned[task], task)
    result = adapt(
        pretrained,
        [(files[task].anchors, layer) for task, layer in finetuned.items()],
        mode="weights" if start is None else "coefficients",
        start=start,
        epochs=args.adapt_epochs,
        lr=args.adapt_lr,
        batch_size=args.adapt_batch_size,
        distance=LOSSES[args.adapt_loss],
        engine=args.engine,
        precision=args.precision,
        order=order,
    )
    return result.layer, result.history


def _stored(file: AnchorFile) -> Tensor:
    if file.targets is None:
        raise InputError(f"anchors file {file.path}", expected="gt, the targets", got="none")
    return file.targets


@torch.no_grad()
def _check_targets(file: AnchorFile, layer: nn.Module, task: str) -> None:
    """Refuse anchors whose stored targets are not what this expert answers."""
    if file.targets is None:
        return
    target = call_layer(layer, file.anchors)
    scale = target.norm().clamp_min(torch.finfo(target.dtype).tiny)
    error = ((file.targets - target).norm() / scale).item()
    if not error <= _TARGET_TOLERANCE:
        raise InputError(
            f"anchors file {file.path}: its targets are not the outputs of the expert of {task}",
            expected="anchors made from these checkpoints",
            got=f"a relative difference of {error:.2g}",
            fix="Give the experts they were made from, or --as-published to use them all the same",
        )


def _second_copy(args: Namespace, model: Path) -> list[Path]:
    """The folder ``code/``: the same weights with the tokenizer of the merged model's twin.

    Weights are linked, not copied, where the file system can.
    """
    target = model.with_name("code")
    shutil.copytree(model, target, copy_function=_link)
    twin = _twin(Path(args.merged_model_path))
    if twin is not None and twin.is_dir():
        for path in sorted(twin.glob("*token*")):
            if path.is_file():
                (target / path.name).unlink(missing_ok=True)
                shutil.copyfile(path, target / path.name)
    return [target]


def _twin(path: Path) -> Path | None:
    """The path with its first folder ``math`` called ``code``; None if it has none."""
    parts = list(path.parts)
    if "math" not in parts:
        return None
    parts[parts.index("math")] = "code"
    return Path(*parts)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
