"""Work on a sequence of items: the next one is read and the last one saved beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Input = TypeVar("Input")
Output = TypeVar("Output")


def overlapped(
    items: Iterable[Item],
    read: Callable[[Item], Input],
    work: Callable[[Item, Input], Output],
    save: Callable[[Item, Output], None],
    *,
    overlap: bool = True,
) -> float:
    """Read, work on and save every item; item k+1 is read while k is worked on and k-1 saved.

    ``work`` runs in the calling thread, ``read`` and ``save`` in one thread each, so every
    function sees the items in order and never runs twice at a time. At most two inputs and two
    outputs exist at once; each is dropped as soon as it has been used.

    Args:
        items: in order.
        read, work, save: what to do with one.
        overlap: False does one thing after the other in the calling thread, in less memory.

    Returns:
        Seconds that ``work`` stood still, waiting for a read or a save.

    Raises:
        whatever ``read``, ``work`` or ``save`` raises, first things first: what was being saved
        when another stage failed, or Ctrl-C came, is saved to its end.
    """
    if not overlap:
        waited = 0.0
        for item in items:
            begun = time.monotonic()
            given = read(item)
            waited += time.monotonic() - begun
            made = work(item, given)
            del given
            begun = time.monotonic()
            save(item, made)
            waited += time.monotonic() - begun
            del made
        return waited
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "save") as saver:
        try:
            return _pipelined(items, reader, saver, read, work, save)
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            raise


def _pipelined(
    items: Iterable[Item],
    reader: ThreadPoolExecutor,
    saver: ThreadPoolExecutor,
    read: Callable[[Item], Input],
    work: Callable[[Item, Input], Output],
    save: Callable[[Item, Output], None],
) -> float:
    waited = 0.0

    def wait(future: Future[Output] | Future[Input] | Future[None]) -> None:
        nonlocal waited
        begun = time.monotonic()
        future.exception()
        waited += time.monotonic() - begun

    remaining = iter(items)
    item = next(remaining, None)
    if item is None:
        return waited
    reading = reader.submit(read, item)
    saving: Future[None] | None = None
    while item is not None:
        wait(reading)
        given = reading.result()
        following = next(remaining, None)
        if following is not None:
            reading = reader.submit(read, following)
        else:
            del reading  # a future keeps its result alive
        made = work(item, given)
        del given
        if saving is not None:
            wait(saving)
            saving.result()
        saving = saver.submit(save, item, made)
        del made
        item = following
    assert saving is not None
    wait(saving)
    saving.result()
    return waited
