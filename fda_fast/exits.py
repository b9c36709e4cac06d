"""How a command ends: an error that a user can do something about is one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from fda_fast.errors import InputError

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

_EXPLAINS = ("fda_fast.construct", "fda_fast.adapt", "fda_fast.devices", "fda_fast.distributed")
"""Modules whose RuntimeErrors tell a user enough."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors a user can do something about into one line and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            _complain(str(error))
            raise typer.Exit(BAD_INPUT) from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                # The reader of our output (head, less) has gone: nothing is wrong.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(0) from None
            _complain(_describe(error))
            raise typer.Exit(FAILED) from None
        except RuntimeError as error:
            if not _is_explained(error):
                raise
            notes = " ".join(getattr(error, "__notes__", []))
            _complain(f"{error} {notes}".strip())
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt as error:
            _complain(" ".join(["Interrupted.", *getattr(error, "__notes__", [])]))
            raise typer.Exit(INTERRUPTED) from None

    return run


def _is_explained(error: RuntimeError) -> bool:
    """Whether a run failed for a reason that its message tells, rather than through a bug."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__") if trace is not None else None
    return raised_in in _EXPLAINS


def _complain(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    line = " ".join(text.split())
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))


def _describe(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
