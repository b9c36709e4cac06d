"""Running a published command: ``fda-fast official <vision|nlu|nlg> <construct|adapt> ...``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from fda_fast.compat.official.flags import COMMANDS, MODALITIES, parse
from fda_fast.errors import InputError
from fda_fast.job import choose_device

_USAGE = f"""usage: fda-fast official {{{",".join(MODALITIES)}}} {{{",".join(COMMANDS)}}} [flags]

The published FDA scripts on this package's engine: same flags, folders and files.
  construct   in place of construct_fda.py
  adapt       in place of adapt.py
Add --help behind the two words for the flags of one command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0, or 2 for input that cannot be used.

    Raises:
        OSError, RuntimeError: as ``constructing.run`` and ``adapting.run``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = any(word in ("-h", "--help") for word in arguments[:2])
    if asked or len(arguments) < 2:
        print(_USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    modality, command, *rest = arguments
    try:
        if modality not in MODALITIES or command not in COMMANDS:
            raise InputError(
                "official",
                expected=f"{' | '.join(MODALITIES)}, then {' | '.join(COMMANDS)}",
                got=f"{modality} {command}",
            )
        run(parse(modality, command, rest))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: Namespace) -> None:
    """Run a command whose flags were parsed.

    Raises:
        InputError: input that cannot be used, before work starts where it can be known.
    """
    if args.precision is None:
        args.precision = "fp32" if args.as_published else "auto"
    device = _device(args)

    def say(line: str) -> None:
        if not args.quiet:
            print(line, flush=True)

    # Imported here: --help needs neither transformers nor the engine.
    if args.command == "construct":
        from fda_fast.compat.official import constructing

        constructing.run(args, device, say)
        return
    from fda_fast.compat.official import adapting

    for path in adapting.run(args, device, say):
        say(f"written: {path}")


def _device(args: Namespace) -> torch.device:
    if args.device is not None or args.modality != "nlg":
        return choose_device(args.device or "auto")
    if args.gpu < 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    return choose_device(f"cuda:{args.gpu}")
