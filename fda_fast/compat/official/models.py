"""The pretrained model and the experts of a published command, wherever its paths point."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fda_fast.checkpoints.align import ExpertView, check_finite, match_expert
from fda_fast.checkpoints.card import model_card
from fda_fast.checkpoints.directory import INDEXED, SINGLE, SPLIT_INDEX
from fda_fast.checkpoints.layout import LayerSpec, ModelLayout, Scope
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.writer import MergedWriter
from fda_fast.compat.official import folders
from fda_fast.compat.official.openclip import OpenClip
from fda_fast.errors import InputError

SUFFIXES = ("", ".pt", ".safetensors", ".pth", ".bin")
"""How a model's path may end, tried in turn: a directory, then one file."""

_LEARNING_RATE = 1e-5  # in the names of the NLU experts' folders
_POSITIONS = re.compile(r"position_embeddings?(\.weight)?$")


class Models(Protocol):
    """Layers of the pretrained model and of the experts."""

    base: Checkpoint
    n_layers: int
    tasks: list[str]
    tokens: int
    width: int

    def read(self, index: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The pretrained layer and those of the experts by task, float32, on ``device``."""

    def read_merged(self, path: Path, index: int) -> dict[str, Tensor]:
        """A layer of another model of the kind, by names in the layer."""

    def global_names(self, index: int) -> dict[str, str]:
        """{name in the layer: name in the pretrained model}."""


class HuggingFace:
    """Models in Hugging Face directories.

    Args:
        pretrained: directory of the pretrained model.
        experts: those of the experts by task.
        device: where layers are built.
        scope: "block" or "mlp".

    Attributes:
        layout: the pretrained model's.
        layers: its layers; of a CLIP model those of the image encoder.

    Raises:
        InputError: whatever ``Checkpoint.open``, ``ModelLayout`` and ``match_expert`` refuse.
    """

    def __init__(
        self, pretrained: Path, experts: Mapping[str, Path], device: torch.device, scope: Scope
    ) -> None:
        self.device = device
        self.base = Checkpoint.open(pretrained, "pretrained model")
        self.layout = ModelLayout.from_checkpoint(self.base, scope)
        self.layers = [spec for spec in self.layout.layers if "text_model" not in spec.name]
        if not self.layers:
            raise InputError(f"no layers found in the pretrained model {pretrained}")
        self.n_layers, self.width = len(self.layers), self.layers[0].width
        self.tasks = list(experts)
        self.views = {
            task: match_expert(self.base, Checkpoint.open(path, f"expert {task}"), self.layout)
            for task, path in experts.items()
        }
        self.tokens = next(
            (
                info.shape[-2]
                for name, info in self.base.names.items()
                if _POSITIONS.search(name) and "text_model" not in name
            ),
            0,
        )
        self._merged: dict[Path, ExpertView] = {}

    def read(self, index: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The pretrained layer and those of the experts by task, float32, on ``device``."""
        spec = self.layers[index]
        stored = list(spec.tensors.values())
        base = self.base.read(stored)
        for name, tensor in base.items():
            check_finite(name, tensor, self.base.role)
        return self._build(spec, base), {
            task: self._build(spec, view.read(stored, pretrained=base))
            for task, view in self.views.items()
        }

    def read_merged(self, path: Path, index: int) -> dict[str, Tensor]:
        """A layer of another model of the kind, by names in the layer."""
        if path not in self._merged:
            merged = Checkpoint.open(path, "merged model")
            self._merged[path] = match_expert(self.base, merged, self.layout)
        names = self.global_names(index)
        tensors = self._merged[path].read(list(names.values()))
        return {local: tensors[name].to(self.device) for local, name in names.items()}

    def global_names(self, index: int) -> dict[str, str]:
        """{name in the layer: name in the pretrained model}."""
        return dict(self.layers[index].parameters)

    def position_embeddings(self, task: str, count: int) -> Tensor:
        """An expert's position embeddings of ids 0 to count - 1, [count, d], float32."""
        name = next((n for n in self.base.names if _POSITIONS.search(n)), None)
        if name is None:
            raise InputError("position embeddings", expected="a tensor of them", got="none")
        tensor = self.views[task].read([name])[name]
        return tensor[:count].to(self.device)

    def lacking_classifier(self) -> tuple[int, int] | None:
        """(width, labels) of the classifier that RoBERTa's loader would draw; None if it has one.

        A pretrained RoBERTa comes with a language-model head, and loading it for classification
        draws random numbers before the anchors are drawn.
        """
        config = self.base.config or {}
        if config.get("model_type") != "roberta":
            return None
        if any(name.startswith("classifier.") for name in self.base.names):
            return None
        labels = config.get("num_labels") or len(config.get("id2label") or (0, 1))
        return self.width, int(labels)

    def _build(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
        local = {name: tensors[stored] for name, stored in spec.tensors.items()}
        return self.layout.build(spec, local).to(self.device)


class HuggingFaceWriter:
    """The merged model as a Hugging Face directory, float32 as published.

    Args:
        output: the directory, new or empty.
        models: the pretrained model and the experts.
        outside: where all tensors outside the layers, config and tokenizer are taken from: a
            merged model (NLG) or None for the pretrained model (Vision, NLU).
    """

    def __init__(self, output: Path, models: HuggingFace, outside: Path | None = None) -> None:
        layout, self._specs = models.layout, models.layers
        if outside is not None:
            merged = Checkpoint.open(outside, "merged model")
            scope: Scope = "mlp" if models.layers[0].scope == "mlp" else "block"
            layout = ModelLayout.from_checkpoint(merged, scope)
            self._specs = layout.layers
            if len(self._specs) != models.n_layers:
                raise InputError(
                    f"the merged model {outside}: layers",
                    expected=models.n_layers,
                    got=len(self._specs),
                )
        self._layout, self._models = layout, models
        self._writer = MergedWriter(output, layout, dtype=torch.float32)
        self._added: set[str] = set()

    def add(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the merged tensors of a layer, by names in the layer."""
        names = self._specs[index].parameters
        for local, tensor in tensors.items():
            self._writer.add(names[local], tensor)
            self._added.add(names[local])

    def finish(self) -> list[Path]:
        """Write everything else and let the directory appear."""
        base = self._layout.base
        for name in self._writer.names:
            if name not in self._added:
                tensor = base.read([name])[name]
                check_finite(name, tensor, base.role)
                self._writer.add(name, tensor)
        experts = {task: view.expert for task, view in self._models.views.items()}
        title = f"Merged by Functional Dual Anchors from {', '.join(experts)}"
        card = model_card(
            title,
            base,
            experts,
            method="Functional Dual Anchors, by the published scripts' settings",
            settings={},
            config_yaml="",
        )
        return [self._writer.finish(card=card)]

    def close(self) -> None:
        """Remove what was written, unless ``finish`` has published it."""
        self._writer.close()


def open_models(args: Namespace, device: torch.device) -> OpenClip | HuggingFace:
    """The models a command names.

    Vision: {model_location}/{model}/zeroshot and .../{task}/finetuned, each one file or a Hugging
    Face directory. NLU: {model_location}/{model} and {model_location}/{task}/{model}_lr1e-05. NLG:
    {model_location}/{language_model_name} and the experts' published folder names.

    Raises:
        InputError: nothing there, or something that cannot be used.
    """
    root, tasks = Path(args.model_location), folders.tasks(args)
    if args.modality == "vision":
        home = root / args.model
        base = locate(home / "zeroshot", "the pretrained encoder", "--model_location")
        experts = {
            task: locate(home / task / "finetuned", f"the encoder of {task}", "--model_location")
            for task in tasks
        }
        if base.is_file():
            return OpenClip(
                base, experts, device, head_width=args.head_width, activation=args.activation
            )
        return HuggingFace(base, experts, device, "block")
    if args.modality == "nlu":
        base = locate(root / args.model, "the pretrained model", "--model_location")
        named = {task: root / task / f"{args.model}_lr{_LEARNING_RATE}" for task in tasks}
    else:
        base = locate(root / args.language_model_name, "the pretrained model", "--model_location")
        named = {task: root / folders.NLG_MODELS.get(task, task) for task in tasks}
    experts = {
        task: locate(path, f"the expert of {task}", "--model_location")
        for task, path in named.items()
    }
    return HuggingFace(base, experts, device, "mlp" if args.modality == "nlg" else "block")


def locate(stem: Path, what: str, flag: str) -> Path:
    """The first of ``stem`` and ``stem`` with a known suffix that exists.

    Raises:
        InputError: none does.
    """
    found = next((path for path in _candidates(stem) if path.exists()), None)
    if found is None:
        raise InputError(
            what,
            expected=f"{stem}, or with {', '.join(SUFFIXES[1:])}",
            got="nothing there",
            fix=f"Point {flag} at the folder that holds it",
        )
    return _split(found) if found.is_dir() else found


def _split(folder: Path) -> Path:
    """The folder's ``split/``, which NLG's split_model.py makes, if that is all it has."""
    parts = folder / "split"
    whole = any((folder / name).exists() for name in (*SINGLE, *INDEXED))
    return parts if not whole and (parts / SPLIT_INDEX).is_file() else folder


def _candidates(stem: Path) -> list[Path]:
    return [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
