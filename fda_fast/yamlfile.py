"""Reading a YAML file of a user's: keys with their lines, nothing executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fda_fast.config_values import SHORT
from fda_fast.errors import InputError

MAX_YAML_BYTES = 4 << 20
"""Far above any real configuration; a larger file is not one."""


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    """The mapping a YAML file holds, and the line of every key by its path.

    Raises:
        InputError: unreadable, huge, not valid YAML, no mapping, or a key given twice.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise InputError(str(path), expected="a YAML configuration", got="a huge file")
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise InputError(
            str(path),
            expected="a YAML configuration",
            got="a folder",
            fix="`fda-fast plan` takes a model's folder, `fda-fast inspect` looks into any.",
        ) from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", fix="Give the YAML configuration.") from None
    except UnicodeDecodeError:
        raise InputError(
            str(path),
            expected="a YAML configuration",
            got="a file that is no text",
            fix="`fda-fast inspect` looks into models.",
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[tuple[str | int, ...], int] = {}
        if node is not None:
            _note_lines(node, (), lines, str(path))
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{path}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    if not isinstance(data, dict):
        raise InputError(
            str(path),
            expected="keys such as merge_method, base_model, models",
            got=SHORT.repr(data),
        )
    return data, lines


def _note_lines(
    node: yaml.Node,
    at: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    where: str,
) -> None:
    """Line of every key; a key given twice is an error (YAML would silently take the last)."""
    if len(at) > 8 or len(lines) > 10_000:
        return  # anchors and aliases can make the tree exponentially larger than the file
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                raise InputError(f"{where}, line {line}: {key.value} is given twice")
            lines[here] = line
            _note_lines(value, here, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _note_lines(value, (*at, index), lines, where)
