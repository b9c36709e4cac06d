"""The config.json that a pickled model of transformers carries inside."""

from __future__ import annotations

from typing import Any

import torch

from fda_fast.checkpoints.pickles.values import Record

_MAX_DEPTH = 6
_MAX_ENTRIES = 100_000


def config_of(module: Record) -> dict[str, Any] | None:
    """A pickled model's configuration, as its config.json has it.

    Args:
        module: the pickled module.

    Returns:
        The entries, with model_type and architectures; None if it is no model of transformers.
    """
    config = module.get("config")
    if not isinstance(config, Record) or not config.name.startswith("transformers.models."):
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kinds = {kind: model_type for model_type, kind in CONFIG_MAPPING_NAMES.items()}
    if config.kind not in kinds:
        return None
    entries: dict[str, Any] = _Plain().entries(config.state or {}, 0)
    entries["model_type"] = kinds[config.kind]
    if not entries.get("architectures"):
        entries["architectures"] = [module.kind]
    return entries


class _Plain:
    """What of a value JSON can hold; the rest is left out."""

    def __init__(self) -> None:
        self._left = _MAX_ENTRIES

    def entries(self, items: dict[Any, Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items.items():
            # Private attributes are no entries of the file, dtypes are those of the weights.
            if isinstance(key, (str, int)) and not str(key).startswith("_"):
                self._add(found, str(key), value, depth)
        return found

    def _add(self, found: dict[str, Any], key: str, value: Any, depth: int) -> None:
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH or isinstance(value, torch.dtype):
            return
        if value is None or isinstance(value, (bool, int, float, str)):
            found[key] = value
        elif isinstance(value, (list, tuple)):
            inner: dict[str, Any] = {}
            for index, entry in enumerate(value[:_MAX_ENTRIES]):
                self._add(inner, str(index), entry, depth + 1)
            found[key] = list(inner.values())
        elif isinstance(value, dict):
            found[key] = self.entries(value, depth + 1)
        elif isinstance(value, Record) and value.state is not None:
            found[key] = self.entries(value.state, depth + 1)
