"""One layer of a merge: the anchors of every task, then the merged layer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fda_fast.adapt import Adaptation, adapt
from fda_fast.anchors import Anchors, init_anchors
from fda_fast.construct import construct
from fda_fast.curve import Curve
from fda_fast.errors import InputError
from fda_fast.machine import here
from fda_fast.progress import Display
from fda_fast.settings import Settings


@dataclass(frozen=True)
class LayerInput:
    """A layer of the base and of every expert, read and checked.

    Attributes:
        name: the layer's name in the base.
        index: its number.
        width: its input width d.
        pretrained: the base's layer, float32, on the device that computes.
        finetuned: the experts' layers by task name, likewise.
        unchanged: tasks whose expert has this whole layer exactly as the base has it.
        hashes: SHA-256 of the layer's tensors by task name, "" for the base.
    """

    name: str
    index: int
    width: int
    pretrained: nn.Module
    finetuned: Mapping[str, nn.Module]
    unchanged: frozenset[str]
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class TaskResult:
    """What construction reached for one (layer, task).

    Attributes:
        loss: alignment loss of the anchors kept.
        cosines: cosine of gradient and task vector by parameter name.
        steps: steps done, where ``patience`` could end them early.
        history: the alignment loss over the steps, if known.
    """

    loss: float
    cosines: Mapping[str, float]
    steps: int | None = None
    history: Curve | None = None

    @classmethod
    def of(cls, anchors: Anchors) -> TaskResult:
        """What finished anchors say about themselves."""
        steps = anchors.settings.get("steps_done")
        return cls(anchors.loss, dict(anchors.cosines), steps, anchors.history)

    def as_record(self) -> dict[str, Any]:
        """JSON values, without what is unknown."""
        record: dict[str, Any] = {"loss": self.loss, "cosines": dict(self.cosines)}
        if self.steps is not None:
            record["steps"] = self.steps
        if self.history is not None:
            record["history"] = self.history.as_record()
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TaskResult:
        """What ``as_record`` gave."""
        history = Curve.from_record(record["history"]) if "history" in record else None
        return cls(record["loss"], record["cosines"], record.get("steps"), history)

    @property
    def mean_cosine(self) -> float:
        """Mean over the parameter tensors."""
        return sum(self.cosines.values()) / max(1, len(self.cosines))


@dataclass
class LayerResult:
    """What one layer came to.

    Attributes:
        layer: its name.
        tasks: results by task name.
        adaptation: mean loss of an anchor in the first and in the last epoch; None without one.
        snapshots: that loss in every epoch of which a model is kept.
        epochs: that loss in every epoch, to six digits.
        seconds: time by phase in this run; empty if an earlier run did the layer.
    """

    layer: str
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    adaptation: tuple[float, float] | None = None
    snapshots: dict[int, float] = field(default_factory=dict)
    epochs: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        """The part that is the same in every run."""
        tasks = {task: result.as_record() for task, result in self.tasks.items()}
        record: dict[str, Any] = {"layer": self.layer, "tasks": tasks}
        record["adaptation"] = self.adaptation
        if self.snapshots:
            record["snapshots"] = self.snapshots
        if self.epochs:
            record["epochs"] = self.epochs
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LayerResult:
        """What ``as_record`` gave."""
        tasks = {task: TaskResult.from_record(found) for task, found in record["tasks"].items()}
        adaptation = record["adaptation"]
        snapshots = {int(epoch): loss for epoch, loss in record.get("snapshots", {}).items()}
        pair = tuple(adaptation) if adaptation else None
        return cls(record["layer"], tasks, pair, snapshots, record.get("epochs", []))

    def at(self, epoch: int) -> LayerResult:
        """The result of a run that ended after ``epoch`` epochs."""
        adaptation = self.adaptation
        if adaptation is not None:
            adaptation = adaptation[0], self.snapshots[epoch]
        epochs = self.epochs[:epoch]
        return dataclasses.replace(self, adaptation=adaptation, snapshots={}, epochs=epochs)


def stable_seed(*parts: object) -> int:
    """63 bits that depend on ``parts`` alone, on every machine and in any order of work."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def is_unchanged(pretrained: nn.Module, finetuned: nn.Module) -> bool:
    """Whether all parameters are exactly equal."""
    theirs = dict(finetuned.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in pretrained.named_parameters())


def first_anchors(inputs: LayerInput, task: str, settings: Settings) -> Tensor:
    """The anchors that construction starts from; depend on seed, layer and task only."""
    wanted = settings.construct
    assert wanted.scale != "auto", "the scale is chosen before the first layer"
    generator = torch.Generator().manual_seed(stable_seed(wanted.seed, inputs.name, task))
    return init_anchors(
        inputs.finetuned[task],
        wanted.shape(inputs.width),
        wanted.init,
        wanted.scale,
        generator,
        layout=wanted.layout,
    )


def construct_layer(
    inputs: LayerInput,
    settings: Settings,
    groups: Sequence[Sequence[str]],
    paths: Mapping[str, Path],
    display: Display,
    part: int | None = None,
) -> dict[str, Anchors]:
    """Anchors of every task; those already on disk are kept, new ones are saved at once.

    Args:
        inputs: the layer.
        settings: of the merge.
        groups: tasks that are optimised in one batch. A group is done as a whole or not at all,
            because the size of a batch can change the last bits of a result.
        paths: anchors file of every task.
        display: shows the steps.
        part: anchors of a task that a step holds at once; None for all.
    """
    found: dict[str, Anchors] = {}
    for group in groups:
        saved = {task: _load(paths[task], inputs, task, settings) for task in group}
        if all(anchors is not None for anchors in saved.values()):
            found |= {task: anchors for task, anchors in saved.items() if anchors is not None}
            continue
        made = _construct_group(inputs, settings, group, len(groups), display, part)
        for task, anchors in made.items():
            anchors.save(paths[task])
        found |= made
    return found


def _construct_group(
    inputs: LayerInput,
    settings: Settings,
    group: Sequence[str],
    groups: int,
    display: Display,
    part: int | None,
) -> dict[str, Anchors]:
    wanted = settings.construct
    starts = {task: first_anchors(inputs, task, settings) for task in group}
    made = {}
    for task in group:
        if task in inputs.unchanged:
            # No task vector, so no direction to align with: the first anchors stay, and tell
            # adaptation that this task wants the base's layer.
            names = [name for name, _ in inputs.pretrained.named_parameters()]
            made[task] = _pack(
                inputs, task, settings, starts[task], float(len(names)), dict.fromkeys(names, 0.0)
            )
    moving = [task for task in group if task not in inputs.unchanged]
    if not moving:
        return made
    display.begin("construct", inputs.name, inputs.index, wanted.steps, moving, groups)
    result = construct(
        inputs.pretrained,
        [inputs.finetuned[task] for task in moving],
        [starts[task] for task in moving],
        steps=wanted.steps,
        lr=wanted.lr,
        weight_decay=wanted.weight_decay,
        betas=wanted.betas,
        eps=wanted.eps,
        distance=wanted.distance,
        engine=settings.engine,
        precision=settings.precision,
        patience=wanted.patience,
        part=part,
        progress=False,
        on_step=display.on_step,
    )
    display.end()
    assert isinstance(result.loss, list) and isinstance(result.cosines, list)
    assert isinstance(result.steps, list)
    circumstances = _circumstances(inputs, moving, part)
    for i, task in enumerate(moving):
        made[task] = _pack(
            inputs,
            task,
            settings,
            result.anchors[i],
            result.loss[i],
            result.cosines[i],
            steps=result.steps[i] if wanted.patience else None,
            history=Curve.of(result.history[: result.steps[i], i].tolist()),
            circumstances=circumstances,
        )
    return made


def _pack(
    inputs: LayerInput,
    task: str,
    settings: Settings,
    tensor: Tensor,
    loss: float,
    cosines: Mapping[str, float],
    steps: int | None = None,
    history: Curve | None = None,
    circumstances: Mapping[str, Any] | None = None,
) -> Anchors:
    done = {} if steps is None else {"steps_done": steps}
    return Anchors(
        tensor.detach().to("cpu", torch.float32),
        layer=inputs.name,
        task=task,
        settings=construction_settings(settings) | done | dict(circumstances or {}),
        cosines=cosines,
        loss=loss,
        pretrained_sha256=inputs.hashes[""],
        expert_sha256=inputs.hashes[task],
        history=history,
    )


def _circumstances(inputs: LayerInput, batch: Sequence[str], part: int | None) -> dict[str, Any]:
    """What decides the last bits of anchors beside the settings, for whoever repeats them."""
    found: dict[str, Any] = {"machine": here(next(inputs.pretrained.parameters()).device)}
    if len(batch) > 1:
        found["batch"] = list(batch)
    if part is not None:
        found["part"] = part
    return found


def construction_settings(settings: Settings) -> dict[str, Any]:
    """What decides the anchors, as their files record it."""
    found: dict[str, Any] = settings.as_dict()["construct"]
    # Tuples come back from a file as lists.
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
    return {**values, "engine": settings.engine, "precision": settings.precision}


def _load(path: Path, inputs: LayerInput, task: str, settings: Settings) -> Anchors | None:
    """Anchors of an earlier run of this very job, or None."""
    if not path.exists():
        return None
    anchors = Anchors.load(path, shape=settings.construct.shape(inputs.width))
    check_origin(anchors, inputs, task, path)
    return anchors


def check_origin(anchors: Anchors, inputs: LayerInput, task: str, path: Path) -> None:
    """Refuse anchors that were made for another layer or from other weights.

    Raises:
        InputError: naming the file and what does not fit.
    """
    if anchors.layer != inputs.name:
        raise InputError(f"anchors file {path}: layer", expected=inputs.name, got=anchors.layer)
    pairs = {
        "the base model": (anchors.pretrained_sha256, inputs.hashes[""]),
        f"expert {task}": (anchors.expert_sha256, inputs.hashes[task]),
    }
    for whose, (made_from, now) in pairs.items():
        if made_from and made_from != now:
            raise InputError(
                f"anchors file {path} was made from other weights of {whose}",
                expected=f"layer {inputs.name} with SHA-256 {made_from[:16]}...",
                got=f"{now[:16]}...",
                fix="Construct the anchors again, or give the checkpoints they were made from.",
            )


def adapt_layer(
    inputs: LayerInput,
    anchors: Mapping[str, Anchors],
    start: Any,
    settings: Settings,
    display: Display,
    extra: Mapping[str, Tensor] | None = None,
    part: int | None = None,
) -> Adaptation:
    """The merged layer, and its mean loss per anchor in every epoch.

    Args:
        inputs: the layer.
        anchors: of every task.
        start: as ``adapt`` takes it.
        settings: of the merge.
        display: shows the epochs.
        extra: further anchors by task, such as real activations, [n, (T,) d] with any n.
        part: anchors that a step holds at once; None for a batch.
    """
    wanted = settings.adapt
    device = next(inputs.pretrained.parameters()).device
    tasks = []
    for task, layer in inputs.finetuned.items():
        tensor = anchors[task].tensor
        if extra is not None and task in extra:
            tensor = torch.cat([tensor, extra[task]])
        tasks.append((tensor.to(device), layer))
    display.begin("adapt", inputs.name, inputs.index, wanted.epochs, list(inputs.finetuned))
    result = adapt(
        inputs.pretrained,
        tasks,
        mode=wanted.mode,
        start=start,
        epochs=wanted.epochs,
        lr=wanted.lr,
        batch_size=wanted.batch_size,
        distance=wanted.distance,
        engine=settings.engine,
        precision=settings.precision,
        seed=stable_seed(settings.construct.seed, inputs.name, "adapt") % 2**31,
        snapshots=wanted.snapshots[:-1],
        part=part,
        on_epoch=display.on_epoch,
    )
    display.end()
    return result
