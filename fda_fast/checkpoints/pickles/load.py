"""Opening a pickled file, and saying why it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fda_fast.checkpoints.pickles import containers
from fda_fast.checkpoints.pickles.values import Malformed, Refused
from fda_fast.checkpoints.tensorfile import TensorFile
from fda_fast.errors import InputError


def load_pickle(file: TensorFile) -> Any:
    """The object a pickled file holds, as data.

    Reads what ``torch.save`` writes (zip, and the raw format before 1.6) and plain pickles.

    Args:
        file: the file.

    Returns:
        dicts, lists, tuples, sets, numbers, texts; ``PickledTensor``, ``PickledArray``; and
        ``Record`` or ``Reference`` for instances of classes and for functions.

    Raises:
        InputError: damaged, too large to be a checkpoint's pickle, or it names code (named).

    Cost: the pickle alone is read, no tensor; at most 2 million operations (seconds) and a few
    hundred MB whatever the file holds.
    """
    with explained(file):
        return containers.load(file)


@contextmanager
def explained(file: TensorFile) -> Iterator[None]:
    """Turn what the interpreter finds into an InputError that names the file."""
    try:
        yield
    except Refused as error:
        raise refusal(file, str(error)) from error
    except Malformed as error:
        raise damaged(file, str(error)) from error


def refusal(file: TensorFile, name: str) -> InputError:
    """The error for a pickle that names code."""
    return InputError(
        f"file {file.path} of the {file.role} is a pickle that needs code to be loaded",
        expected="tensors, containers and modules of the known libraries",
        got=f"a reference to {name}",
        fix="Loading it could run any program. Where it was made, save model.state_dict() or, "
        "better, model.save_pretrained(directory) and use that",
    )


def damaged(file: TensorFile, what: str) -> InputError:
    """The error for a file whose contents do not fit together."""
    return InputError(
        f"file {file.path} of the {file.role} is not an intact pickled checkpoint",
        got=what,
        fix="Download or copy it again, or save it as safetensors",
    )
