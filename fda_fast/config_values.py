"""The kinds of numbers a configuration holds, checked with errors that name the key alone."""

from __future__ import annotations

import math
import reprlib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

SHORT = reprlib.Repr()
"""Shows values of a user's in errors, however long they are."""
SHORT.maxstring = SHORT.maxother = 80


def no_bool(value: object) -> object:
    """YAML's ``yes`` and ``on`` are booleans, and Python's True is the number 1."""
    if isinstance(value, bool):
        raise ValueError("a boolean where a number belongs")
    return value


Count = Annotated[int, BeforeValidator(no_bool), Field(ge=1)]
Positive = Annotated[float, BeforeValidator(no_bool), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(no_bool), Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scale(value: object) -> object:
    if value == "auto":
        return value
    if isinstance(value, int | float) and _is_number(value) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"a positive number or auto, not {SHORT.repr(value)}")


def _betas(value: object) -> object:
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)):
        first, second = map(float, value)
        if 0 <= first < 1 and 0 <= second < 1:
            return first, second
    raise ValueError(f"two numbers from 0 to below 1, not {SHORT.repr(value)}")


def _epochs(value: object) -> object:
    counts: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not counts or any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"a positive integer or a list of them, not {SHORT.repr(value)}")
    return counts[0] if len(counts) == 1 else tuple(sorted(set(counts)))


# Written out, because a union's errors name its branches rather than the key.
Scale = Annotated[float | Literal["auto"], PlainValidator(_scale)]
Betas = Annotated[tuple[float, float], PlainValidator(_betas)]
Epochs = Annotated[int | tuple[int, ...], PlainValidator(_epochs)]
