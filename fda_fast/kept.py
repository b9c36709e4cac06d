"""What the end of a merge before its time says of the work that is kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fda_fast.work import WorkDirectory

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def explained(work: WorkDirectory, *, restart: bool = False) -> Iterator[None]:
    """Say what a full disk or Ctrl-C means for the merge: what is finished is not lost.

    Args:
        work: the merge's; what is there before it is opened may be of another merge.
        restart: as the merge was told.

    Raises:
        OSError: in place of a full disk's, with what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        advice = "make room and run the same merge again"
        if work.is_open and work.has_finished():
            advice = f"finished work is kept in {work.path}; {advice} to go on from there"
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)}: {advice}",
            error.filename or str(work.path),
        ) from error
    except KeyboardInterrupt as error:
        if work.is_open:
            note_kept(error, work, restart=restart)
        raise


def note_kept(error: BaseException, work: WorkDirectory, *, restart: bool) -> None:
    """Let the error that ends a merge say where finished work is, if there is any.

    Args:
        error: gets the note.
        work: of the merge.
        restart: as the merge was told; told again, it would throw the work away.
    """
    if work.has_finished():
        same = "the same command without --restart" if restart else "the same command"
        error.add_note(f"Finished work is kept in {work.path}; {same} goes on from there.")
