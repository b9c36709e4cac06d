"""A checkpoint on the Hub, opened from its configuration and headers: no weights are fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fda_fast import hub
from fda_fast.checkpoints import directory
from fda_fast.checkpoints.headers import read_header
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.tensorfile import TensorFile, TensorInfo
from fda_fast.errors import InputError, with_path

# Fetched at once; longer headers, of shards with thousands of tensors, take a second request.
_FIRST = 128 << 10
_AT_ONCE = 8


class RemoteCheckpoint(Checkpoint):
    """A model or adapter of the Hub as ``Checkpoint.open`` would give it, but for ``read``.

    Args:
        model: looked up.
        role: as in ``Checkpoint.open``.

    Raises:
        InputError: weights that are pickled, headers or configuration as ``Checkpoint.open``
            refuses them, a connection that breaks.

    Cost: config.json, the index and one or two small requests for each file of weights.
    """

    def __init__(self, model: hub.HubModel, role: str = "base model") -> None:
        names = hub.weights_of(model.files)
        pickled = [name for name in names if not name.endswith(".safetensors")]
        if pickled or not names:
            raise InputError(
                f"the {role} {model.name} on the Hub",
                expected="safetensors, whose headers say what is in them",
                got=f"{pickled[0]}, which only the whole download can tell" if pickled else "none",
                fix=f"Run `hf download {model.name}` first; or plan from its config.json alone: "
                "`fda-fast plan config.json`.",
            )
        folder = hub.fetch_configuration(model)
        self.model = model
        self._remote = {folder / name: RemoteFile(model, folder / name, role) for name in names}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(RemoteFile.begin, self._remote.values()))
        super().__init__(folder, role, _contents(folder, names, role))

    def read(
        self, names: Iterable[str], at_hand: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Refuses: the weights are not here.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"the weights of the {with_path(self.role, self.path)} were not downloaded"
        )

    def _open_file(self, path: Path) -> dict[str, TensorInfo]:
        return read_header(self._remote[path])


class RemoteFile(TensorFile):
    """The bytes of one file on the Hub, a range at a time.

    Args:
        model: it belongs to.
        path: where it will lie once it is downloaded; its name is the file's.
        role: as in ``TensorFile``.
    """

    def __init__(self, model: hub.HubModel, path: Path, role: str) -> None:
        self.path, self.role = path, role
        self.size = model.files[path.name]
        self._model = model
        self._beginning = b""

    def begin(self) -> None:
        """Fetch what usually holds the whole header."""
        self._beginning = self._fetch(0, min(_FIRST, self.size))

    def read_bytes(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``; fewer only at the end of the file."""
        end = min(offset + count, self.size)
        if end <= len(self._beginning):
            return self._beginning[offset:end]
        return self._fetch(offset, end - offset)

    def _fetch(self, offset: int, count: int) -> bytes:
        return hub.read_range(self._model, self.path.name, offset, count) if count > 0 else b""


def _contents(folder: Path, names: list[str], role: str) -> directory.Contents:
    files = tuple(folder / name for name in names)
    config = directory.read_config(folder, role)
    adapter = None
    if (folder / directory.ADAPTER_CONFIG).is_file():
        adapter = directory.read_object(folder, directory.ADAPTER_CONFIG, role)
    index = folder / directory.INDEXED[0]
    if directory.SINGLE[0] in names or not index.is_file():
        return directory.Contents(files[:1], None, config, adapter, beside=folder)
    weight_map = directory.read_index(folder, index.name, role, there=names)
    chosen = tuple(dict.fromkeys(weight_map.values()))
    return directory.Contents(chosen, weight_map, config, adapter, beside=folder)


def remote_notes(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """What a plan should say of models that are still on the Hub; nothing if none is.

    Args:
        checkpoints: the base's and the experts'.
    """
    models = {c.model.name: c.model for c in checkpoints if isinstance(c, RemoteCheckpoint)}
    if not models:
        return []
    size = sum(map(hub.missing_bytes, models.values())) / 1e9
    return [
        f"a merge first downloads {', '.join(models)}: {size:.3g} GB. Planned from their headers; "
        "whether an expert differs from the base, and whether all weights are finite, is only "
        "known then"
    ]
