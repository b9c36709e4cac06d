"""What a checkpoint, an anchors file or folder, or a work directory holds, as tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fda_fast import reporting
from fda_fast.anchors import Anchors
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint, some
from fda_fast.errors import InputError
from fda_fast.layerwork import TaskResult
from fda_fast.work import SUFFIX
from fda_fast.yamlfile import read_yaml

_RECIPE = {"merge_method", "base_model", "models", "slices"}
"""Keys that only a merge has."""


def show(path: Path, console: Console | None = None) -> None:
    """Print what is at ``path``; reads headers and metadata, and the tensors of anchors files.

    Args:
        path: a checkpoint or a folder of them by epochs, an anchors file, a folder of anchors, or
            a work directory.
        console: where to print.

    Raises:
        InputError: nothing there, or none of these.
    """
    console = console or reporting.console()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    for part in _describe(path):
        console.print(part)


def _describe(path: Path) -> Iterator[Table | Text]:
    if path.is_dir() and (path / "job.json").exists():
        yield from _work_directory(path)
    elif several := _snapshots(path):
        for model in several:
            yield from _checkpoint(model)
    elif path.is_dir() and not _is_model(path) and (files := _anchors_files(path)):
        yield from _anchors_table(files)
    elif path.is_file() and path.suffix == ".safetensors" and _is_anchors(path):
        yield from _anchors_file(path)
    else:
        _refuse_descriptions(path)
        yield from _checkpoint(path)


def _refuse_descriptions(path: Path) -> None:
    """Refuse a file that describes a merge or a model and holds neither, by what it is."""
    if path.is_dir() or path.suffix not in (".yaml", ".yml", ".json"):
        return
    try:
        content, _ = read_yaml(path)  # JSON is YAML
    except InputError:
        return  # no description of anything: the reader of checkpoints says what it met
    if content.keys() & _RECIPE:
        raise InputError(
            f"{path} is a merge recipe, not a model",
            fix=f"`fda-fast plan {path}` says what it takes, `fda-fast merge {path} OUTPUT` does "
            "it.",
        )
    if "model_type" in content:
        raise InputError(
            f"{path} describes a model without its weights",
            fix=f"Give the folder with the weights; `fda-fast plan {path}` says what merging such "
            "models takes.",
        )


def _snapshots(path: Path) -> list[Path]:
    """The models in the output of a merge with several numbers of epochs, by those numbers."""
    found = [p for p in path.glob("epochs-*") if (p / "config.json").exists()]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def _is_model(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.json", "adapter_config.json"))


def _anchors_files(path: Path) -> list[Path]:
    """The files of a folder of anchors, or of one expert's part of such a folder.

    Raises:
        InputError: a folder of models.
    """
    models = [str(folder) for folder in sorted(path.iterdir()) if _is_model(folder)]
    if models:
        raise InputError(
            f"{path} holds folders of models", fix=f"Give one of them: {some(models)}."
        )
    if files := sorted(path.glob("*/*.safetensors")):
        return files
    own = sorted(path.glob("*.safetensors"))
    return own if own and _is_anchors(own[0]) else []


def _plain(*headings: str, right: int = 1) -> Table:
    """A table without lines; the columns from number ``right`` on hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index >= right else "left")
    return table


def _checkpoint(path: Path) -> Iterator[Table | Text]:
    checkpoint = Checkpoint.open(path, role="checkpoint")
    parameters = sum(info.numel for info in checkpoint.names.values())
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in checkpoint.names.values())
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    what = "PEFT adapter" if checkpoint.adapter is not None else "checkpoint"
    yield Text(
        f"{what} {path}: {len(checkpoint.names)} tensors ({kinds}), {parameters:,} elements, "
        f"{reporting.size(checkpoint.nbytes)}"
    )
    described = checkpoint.config is not None or checkpoint.modules
    if checkpoint.adapter is None and described:
        try:
            layout = ModelLayout.from_checkpoint(checkpoint, "auto")
        except InputError as error:
            yield Text(f"no layers to merge: {error}", style="yellow")
        else:
            yield from _layout(layout)
            return
    table = _plain("tensor", "dtype", "shape", "elements", right=2)
    for name, info in checkpoint.names.items():
        dtype = str(info.dtype).removeprefix("torch.")
        table.add_row(name, dtype, str(list(info.shape)), f"{info.numel:,}")
    yield table


def _layout(layout: ModelLayout) -> Iterator[Table | Text]:
    table = _plain("layer", "kind", "scope", "tensors", "parameters", "width", right=3)
    for spec in layout.layers:
        table.add_row(
            spec.name,
            spec.kind,
            spec.scope,
            str(len(spec.parameters)),
            f"{spec.numel:,}",
            str(spec.width),
        )
    numel = sum(layout.base.names[name].numel for name in layout.outside)
    table.add_row("(outside)", "", "", str(len(layout.outside)), f"{numel:,}", "")
    yield table
    for note in layout.notes:
        yield Text(f"note: {note}")


def _is_anchors(path: Path) -> bool:
    try:
        Anchors.load(path)
    except InputError:
        return False
    return True


def _anchors_file(path: Path) -> Iterator[Table | Text]:
    anchors = Anchors.load(path)
    yield Text(
        f"anchors {list(anchors.tensor.shape)} of layer {anchors.layer}, expert {anchors.task}: "
        f"alignment loss {anchors.loss:.4f}"
    )
    settings = ", ".join(f"{key} {value}" for key, value in sorted(anchors.settings.items()))
    yield Text(f"settings: {settings}")
    yield Text(f"pretrained layer: sha256 {anchors.pretrained_sha256 or 'unknown'}")
    yield Text(f"expert's layer:   sha256 {anchors.expert_sha256 or 'unknown'}")
    table = _plain("parameter", "cosine")
    for name, cosine in anchors.cosines.items():
        table.add_row(name, f"{cosine:.4f}")
    yield table


def _anchors_table(files: list[Path]) -> Iterator[Table | Text]:
    table = _plain("expert", "layer", "anchors", "alignment loss", "mean cosine", right=2)
    for file in files:
        anchors = Anchors.load(file)
        result = TaskResult(anchors.loss, anchors.cosines)
        table.add_row(
            anchors.task,
            anchors.layer,
            str(list(anchors.tensor.shape)),
            f"{anchors.loss:.4f}",
            f"{result.mean_cosine:.3f}",
        )
    yield table


def _work_directory(path: Path) -> Iterator[Table | Text]:
    try:
        content: dict[str, Any] = json.loads((path / "job.json").read_text())
        identity = content["identity"]
        settings = identity["settings"]
        order = identity["order"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path / 'job.json'} is damaged") from None
    output = str(path).removesuffix(SUFFIX)
    yield Text(f"unfinished {identity['mode']} into {output}")
    yield Text(
        f"method {settings['method']}, start {settings['start']}, experts {', '.join(order)}"
    )
    layers = {file.stem for file in path.glob("layers/*.safetensors")}
    found = layers | {file.stem for file in path.glob("anchors/*/*.safetensors")}
    table = _plain("layer", "anchors of", "merged", right=2)
    for layer in sorted(found, key=_natural):
        done = [
            task for task in order if (path / "anchors" / task / f"{layer}.safetensors").exists()
        ]
        table.add_row(layer, ", ".join(done) or "-", "yes" if layer in layers else "no")
    yield table


def _natural(name: str) -> list[Any]:
    """Sorts layer 10 behind layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
