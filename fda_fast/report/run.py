"""A merge's output folder, opened to be reported on; and its checkpoints, if they are given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fda_fast.anchors import Anchors
from fda_fast.errors import InputError
from fda_fast.layerwork import LayerResult
from fda_fast.presets import AdaptSettings, ConstructSettings, StartSettings
from fda_fast.settings import Settings
from fda_fast.times import Times
from fda_fast.work import file_name

if TYPE_CHECKING:
    from fda_fast.job import Job

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """What a merge left behind.

    Attributes:
        folder: the merged model's.
        layers: results per layer.
        settings: every setting of the merge, as fda_report.json has them.
        notes: what the user should know.
        records: what else fda_report.json holds.
        config: fda_config.yml.
        anchors: folder of the anchors, None if they were not kept.
        times: how long it took; empty where the run does not say.
    """

    folder: Path
    layers: list[LayerResult]
    settings: dict[str, Any]
    notes: list[str]
    records: dict[str, Any] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    anchors: Path | None
    times: Times = field(default_factory=Times, repr=False)

    @classmethod
    def open(cls, folder: PathLike) -> Run:
        """Read the report of a merge.

        Raises:
            InputError: no folder that ``merge`` wrote, or a damaged one.
        """
        path = Path(os.path.abspath(Path(folder).expanduser()))
        file = path / "fda_report.json"
        if not path.exists():
            raise InputError(
                f"{path}: no such folder", fix="Give a folder that `fda-fast merge` wrote."
            )
        if not file.is_file():
            found = sorted(p.parent.name for p in path.glob("*/fda_report.json"))
            raise InputError(
                f"{path} has no fda_report.json",
                expected="a folder that `fda-fast merge` wrote",
                fix=f"There is one in each of {', '.join(found)}." if found else None,
            )
        try:
            content = json.loads(file.read_text())
            layers = [LayerResult.from_record(layer) for layer in content.pop("layers")]
            settings, notes = content.pop("settings"), content.pop("notes")
            config_file = path / "fda_config.yml"
            config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else {}
            times = Times.read(path)
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise InputError(f"{file} is damaged", got=f"{type(error).__name__}") from None
        # Of several numbers of epochs, the anchors lie beside the models.
        places = [path / "anchors", path.parent / "anchors"]
        wanted = places if path.name.startswith("epochs-") else places[:1]
        anchors = next((place for place in wanted if place.is_dir()), None)
        return cls(path, layers, settings, notes, content, config, anchors, times)

    @property
    def base(self) -> str:
        """Public name of the base model."""
        return str(self.config.get("base_model", "the base model"))

    @property
    def experts(self) -> dict[str, str]:
        """Public names of the experts' checkpoints by task name."""
        from fda_fast.settings import task_names

        models = self.config.get("models", [])
        references = [str(entry["model"]) for entry in models]
        names = task_names(references, [entry.get("name") for entry in models])
        return dict(zip(names, references, strict=True))

    @property
    def tasks(self) -> list[str]:
        """Names of the experts that anchors were made for, in the configuration's order."""
        there = next((layer.tasks for layer in self.layers if layer.tasks), {})
        known = [name for name in self.experts if name in there]
        return known + [name for name in there if name not in known]

    def saved_anchors(self, task: str, layer: str) -> Anchors | None:
        """The anchors that the run kept of one (layer, task)."""
        if self.anchors is None:
            return None
        path = self.anchors_path(task, layer)
        return Anchors.load(path) if path.is_file() else None

    def anchors_path(self, task: str, layer: str) -> Path:
        """The file of these anchors, if they were kept."""
        folder = self.anchors or self.folder / "anchors"
        return folder / file_name(task) / f"{file_name(layer)}.safetensors"

    def job(self, pretrained: PathLike, experts: Mapping[str, PathLike], device: str) -> Job:
        """The merge's job again, with the settings it had, on checkpoints at these paths.

        Args:
            pretrained: folder of the base.
            experts: folder by task name, of every expert.
            device: "auto", "cpu", "cuda", "cuda:N".

        Raises:
            InputError: experts missing or unknown, another layout than the run's, checkpoints that
                cannot be read.
        """
        from fda_fast.config import parse
        from fda_fast.job import prepare

        wanted = list(self.experts)
        if set(experts) != set(wanted):
            raise InputError(
                "experts",
                expected=", ".join(wanted),
                got=", ".join(experts) or "none",
                fix="Give --expert NAME=PATH for each of them.",
            )
        content = dict(self.config)
        content["base_model"] = os.fspath(pretrained)
        content["models"] = [
            {**entry, "model": os.fspath(experts[name]), "name": name}
            for name, entry in zip(wanted, self.config["models"], strict=True)
        ]
        content["parameters"] = {
            key: value
            for key, value in content.get("parameters", {}).items()
            if key != "extra_anchors"  # a name without its path
        }
        job = prepare(parse(content, where=f"{self.folder / 'fda_config.yml'}"), device)
        job.settings = recorded_settings(self.settings)
        there, here = [spec.name for spec in job.layers], [layer.layer for layer in self.layers]
        if there != here:
            raise InputError(
                f"base model {pretrained}",
                expected=f"the {len(here)} layers of the run: {here[0]}, ...",
                got=f"{len(there)}: {there[0]}, ...",
            )
        return job


def recorded_settings(record: Mapping[str, Any]) -> Settings:
    """Settings as fda_report.json has them.

    Raises:
        InputError: a record of another version of fda_fast.
    """
    try:
        values = dict(record)
        made, fitted = dict(values["construct"]), dict(values["adapt"])
        made["betas"], fitted["snapshots"] = tuple(made["betas"]), tuple(fitted["snapshots"])
        values["construct"] = ConstructSettings(**made)
        values["adapt"] = AdaptSettings(**fitted)
        values["starting"] = StartSettings(**values["starting"])
        values["weights"] = tuple(values["weights"])
        return Settings(**values)
    except (KeyError, TypeError) as error:
        raise InputError("settings in fda_report.json", got=f"{error}") from None
