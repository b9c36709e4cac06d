"""mergekit's parameter values that differ between tensors: filters by name, gradients by depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

Number = float | tuple[float, ...]
"""One value, or a gradient: values at equal distances from the first layer to the last."""


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name contains ``filter``; None or "*" takes every tensor."""

    value: Number
    filter: str | None = None

    def takes(self, name: str) -> bool:
        """Whether the value is for this tensor."""
        return self.filter is None or self.filter == "*" or self.filter in name


Setting = float | tuple[float, ...] | tuple[Condition, ...]
"""A value, a gradient, or conditions of which the first that takes a tensor counts."""


def parse_setting(value: Any) -> Setting:
    """A setting from what YAML says, with mergekit's grammar.

    Raises:
        ValueError: anything else, in words.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return _number(value)
    if not value:
        raise ValueError("an empty list where a value belongs")
    if not any(isinstance(entry, Mapping) for entry in value):
        return tuple(_number(entry) for entry in value)
    return tuple(_condition(entry) for entry in value)


def plain_setting(setting: Setting | None) -> Any:
    """A setting as YAML writes it."""
    if not isinstance(setting, tuple):
        return setting
    return [
        {"filter": entry.filter, "value": _plain(entry.value)}
        if isinstance(entry, Condition) and entry.filter is not None
        else {"value": _plain(entry.value)}
        if isinstance(entry, Condition)
        else entry
        for entry in setting
    ]


TensorSetting = Annotated[
    Any, PlainValidator(parse_setting), PlainSerializer(plain_setting, return_type=Any)
]


def covers(setting: Setting | None) -> bool:
    """Whether every tensor gets a value."""
    if not isinstance(setting, tuple) or not isinstance(setting[0], Condition):
        return setting is not None
    return any(isinstance(entry, Condition) and entry.takes("") for entry in setting)


def chain(first: Setting | None, second: Setting | None) -> Setting | None:
    """The first setting, and the second where it has no value."""
    if first is None or second is None or covers(first):
        return second if first is None else first
    return (*_conditions(first), *_conditions(second))


def evaluate(setting: Setting, name: str, position: float) -> float | None:
    """The value for one tensor.

    Args:
        setting: the setting.
        name: of the tensor.
        position: depth of its layer, 0 for the first to 1 for the last; 0 outside of layers.

    Returns:
        The value; None where no condition takes the tensor.

    Source: mergekit's ``evaluate_setting``.
    """
    for condition in _conditions(setting):
        if condition.takes(name):
            return _interpolate(condition.value, position)
    return None


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Depth of every tensor that belongs to a numbered layer, from 0 to 1 in its stack.

    As in mergekit the only layer of a stack of one is at 1.
    """
    found: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for name in names:
        match = re.match(r"(.*?)\.(\d+)\.", name)
        if match:
            stack, index = match[1], int(match[2])
            found[name] = stack, index
            last[stack] = max(index, last.get(stack, 0))
    return {n: index / last[stack] if last[stack] else 1.0 for n, (stack, index) in found.items()}


def _conditions(setting: Setting) -> tuple[Condition, ...]:
    if isinstance(setting, tuple) and isinstance(setting[0], Condition):
        return setting  # type: ignore[return-value]  # all entries are alike
    return (Condition(setting),)  # type: ignore[arg-type]


def _interpolate(value: Number, position: float) -> float:
    if not isinstance(value, tuple):
        return value
    scaled = position * (len(value) - 1)
    low = int(scaled)
    high = min(len(value) - 1, low + 1)
    return (1 - (scaled - low)) * value[low] + (scaled - low) * value[high]


def _condition(entry: Any) -> Condition:
    if not isinstance(entry, Mapping) or not {"value"} <= entry.keys() <= {"value", "filter"}:
        raise ValueError(f"expected {{filter: ..., value: ...}}, not {str(entry)[:80]!r}")
    name = entry.get("filter")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"a filter is a part of tensor names, not {str(name)[:80]!r}")
    value = entry["value"]
    if isinstance(value, list | tuple) and value:
        return Condition(tuple(_number(one) for one in value), name)
    return Condition(_number(value), name)


def _number(value: Any) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-2 as a string
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"a word where a number belongs: {value[:80]!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, not {str(value)[:80]!r}")
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return float(value)


def _plain(value: Number) -> Any:
    return list(value) if isinstance(value, tuple) else value
