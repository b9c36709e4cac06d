"""The error every refusal of bad input raises."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used, said in one message: what, expected, got, what to do.

    Args:
        what: the thing at fault, named as the user knows it (a file, a tensor, a YAML key).
        expected: what would have been accepted.
        got: what was found.
        fix: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        parts = []
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        message = what if not parts else f"{what}: {', '.join(parts)}"
        if fix:
            message = f"{message}. {fix}"
        super().__init__(message)
        self.what, self.expected, self.got, self.fix = what, expected, got, fix


def with_path(role: str, path: object) -> str:
    """A checkpoint in a message: "expert movie runs/7", and "expert movie" if that is its path."""
    return role if role == f"expert {path}" else f"{role} {path}"
