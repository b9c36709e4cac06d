"""A merge made ready: checkpoints opened and matched, layers found, settings resolved."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from fda_fast.checkpoints.align import ExpertView, match_expert
from fda_fast.checkpoints.described import DescribedCheckpoint
from fda_fast.checkpoints.layout import LayerSpec, ModelLayout
from fda_fast.checkpoints.openclip import published_preset
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.remote import RemoteCheckpoint
from fda_fast.conditional import layer_positions
from fda_fast.config import MergeConfig
from fda_fast.errors import InputError
from fda_fast.hub import fetch_configuration
from fda_fast.layers.precision import fast_bf16
from fda_fast.machine import backends
from fda_fast.presets import Scope
from fda_fast.references import locate, look_up, remote, split_reference
from fda_fast.settings import Settings, choose_preset, requested_scope, resolve, task_names
from fda_fast.version import __version__

WHOLE = 16 << 20
"""Files up to this size are hashed whole, larger ones in samples."""
SAMPLES, SAMPLE = 1024, 4096

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)
"""Files beside the weights that decide the result or are copied to it."""


@dataclass
class Job:
    """Everything a merge needs to know before it touches weights.

    Attributes:
        config: what the user wrote.
        settings: what follows from it.
        base: the pretrained checkpoint.
        experts: by task name, in the configuration's order.
        layout: the base's layers and the tensors outside them.
        device: where layers are computed.
        notes: what the user should know.
        records: what was decided on the way, for the report.
    """

    config: MergeConfig
    settings: Settings
    base: Checkpoint
    experts: dict[str, ExpertView]
    layout: ModelLayout
    device: torch.device
    notes: list[str]
    records: dict[str, Any] = field(default_factory=dict)

    @property
    def extra_anchors(self) -> Path | None:
        """The folder of anchors that adaptation uses beside the constructed ones."""
        folder = self.config.parameters.extra_anchors
        return None if folder is None or not self.settings.optimises else Path(folder)

    @cached_property
    def positions(self) -> dict[str, float]:
        """Depth of the base's tensors in numbered layers, see ``conditional.layer_positions``."""
        return layer_positions(self.base.names)

    @property
    def layers(self) -> list[LayerSpec]:
        """The layers to merge, in order."""
        return self.layout.layers

    def identity(self, mode: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What makes this merge the same as another: settings, inputs and versions.

        Paths are not part of it: checkpoints may move between two runs.

        Args:
            mode: "merge", "construct" or "adapt".
            extra: anything else that decides the result.

        Cost: reads small files whole and 4 MiB of every large one.
        """
        experts = {name: _fingerprints(view.expert) for name, view in self.experts.items()}
        return {
            "mode": mode,
            "settings": self.settings.as_dict(),
            "base": _fingerprints(self.base),
            "experts": experts,
            "order": list(self.experts),
            "device": self.device.type,
            "versions": {
                "fda_fast": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "backends": backends(),
            **self._arithmetic(),
            **(extra or {}),
        }

    def _arithmetic(self) -> dict[str, str]:
        """How bf16 is computed, which on processors is not one thing."""
        if self.settings.precision != "bf16" or self.device.type != "cpu":
            return {}
        return {"bf16": "native" if fast_bf16() else "rounded"}

    def close(self) -> None:
        """Release what the checkpoints hold."""
        self.base.close()
        for view in self.experts.values():
            view.expert.close()


def prepare(config: MergeConfig, device: str = "auto", *, download: bool = True) -> Job:
    """Open and check everything, reading headers but no weights.

    Args:
        config: the merge.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".
        download: False leaves models of the Hub there and reads their headers: enough to plan.

    Raises:
        InputError: anything about the inputs that can be known without reading weights.
    """
    where = choose_device(device)
    look_up([config.base_model, *(entry.model for entry in config.models)])
    base = _open(config.base_model, "base_model", "base model", download)
    if base.adapter is not None:
        raise InputError(
            f"base_model {config.base_model}",
            expected="a whole model",
            got="a PEFT adapter",
        )
    references = [entry.model for entry in config.models]
    names = task_names(references, [entry.name for entry in config.models])
    layout = ModelLayout.from_checkpoint(base, scope=requested_scope(config.parameters))
    if not layout.layers:
        raise InputError(f"no layers found in the base model {config.base_model}")
    experts = {
        name: _open_expert(base, layout, reference, name, download)
        for name, reference in zip(names, references, strict=True)
    }
    return assemble(config, base, experts, layout, where)


def assemble(
    config: MergeConfig,
    base: Checkpoint,
    experts: dict[str, ExpertView],
    layout: ModelLayout,
    device: torch.device,
) -> Job:
    """The job of checkpoints that are open and matched: chooses the preset, resolves settings.

    Args:
        config: the merge.
        base: the pretrained checkpoint.
        experts: by task name, in the configuration's order.
        layout: of the base; at least one layer.
        device: where layers are computed.

    Raises:
        InputError: an unknown preset, values that contradict each other.
    """
    largest = max(layout.layers, key=lambda spec: spec.numel)
    scope: Scope = "mlp" if largest.scope == "mlp" else "block"
    published = published_preset(layout.model) if scope == "block" else None
    preset = choose_preset(
        config.parameters.preset or published,
        scope=scope,
        width=largest.width,
        n_params=largest.numel,
        model=base.config,
    )
    settings = resolve(config, preset, scope)
    notes = [*layout.notes]
    for view in experts.values():
        notes += view.notes
    notes += _twice(experts)
    notes += _faster(settings, device)
    return Job(config, settings, base, experts, layout, device, notes)


def choose_device(name: str) -> torch.device:
    """The torch device of a command-line name.

    Raises:
        InputError: not a device, or not one of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError("device", expected="auto, cpu, cuda or cuda:N", got=repr(name)) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name}", got="no usable CUDA device", fix="Use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name}", expected=f"below cuda:{torch.cuda.device_count()}", got=name
        )
    return device


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and content: all of it up to 16 MiB, else 1,024 samples of 4 KiB.

    Samples tell two trainings or two downloads apart, not a change of a few weights by hand; the
    hashes of whole layers that are kept with the anchors do that.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb", buffering=0) as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek((size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _fingerprints(checkpoint: Checkpoint) -> dict[str, str]:
    paths = dict.fromkeys(info.file for info in checkpoint.names.values())
    folder = checkpoint.directory
    beside = [folder / name for name in SIDE_FILES] if folder is not None else []
    return {path.name: fingerprint(path) for path in [*paths, *beside] if path.is_file()}


def _faster(settings: Settings, device: torch.device) -> list[str]:
    """That this processor could construct faster than it was asked to."""
    asked = settings.optimises and settings.precision == "auto" and settings.engine != "autograd"
    if not asked or device.type != "cpu" or not fast_bf16():
        return []
    return [
        "this processor multiplies bfloat16 faster than float32: with precision bf16 construction "
        "takes about half the time"
    ]


def _twice(experts: Mapping[str, ExpertView]) -> list[str]:
    """Say which experts are one checkpoint: a slip of the list, or a way to weigh it double."""
    first: dict[Path, str] = {}
    notes = []
    for name, view in experts.items():
        if isinstance(view.expert, DescribedCheckpoint):
            continue  # they share one config.json and stand for models that will differ
        path = view.expert.path
        before = first.setdefault(path.resolve(), name) if path.exists() else name
        if before != name:
            notes.append(f"{name} is the same checkpoint as {before}, which counts twice")
    return notes


def _open(reference: str, what: str, role: str, download: bool) -> Checkpoint:
    found = None if download else remote(reference, what)
    if found is not None:
        return RemoteCheckpoint(found, role)
    return Checkpoint.open(locate(reference, what), role=role)


def _open_expert(
    base: Checkpoint, layout: ModelLayout, reference: str, name: str, download: bool
) -> ExpertView:
    path, adapter = split_reference(reference)
    role = f"expert {name}"
    if adapter is not None:
        elsewhere = None if download else remote(path, role)
        under = locate(path, role) if elsewhere is None else fetch_configuration(elsewhere)
        if not os.path.samefile(under, base.path):
            raise InputError(
                f"{role}: {reference}",
                expected=f"an adapter on the base model {base.path}",
                got=f"one on {under}",
                fix="Merge the adapter into its model with peft and give the result.",
            )
        path = adapter
    return match_expert(base, _open(path, role, role, download), layout)


def free_memory(device: torch.device) -> int:
    """Bytes of memory free where ``device`` computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # What the kernel could free by dropping caches counts as free; sysconf leaves it out.
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(available.split()[1])
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def groups_of(tasks: Sequence[str], size: int) -> list[list[str]]:
    """Tasks in batches of ``size``."""
    return [list(tasks[i : i + size]) for i in range(0, len(tasks), size)]
