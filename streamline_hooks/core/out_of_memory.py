"""Run fewer rows at a time after a device has run out of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_T = TypeVar("_T")


def halve_rows(
    run: Callable[[int], _T],
    rows: int,
    say: Callable[[str], None],
    *,
    splits: bool = True,
    gather: Callable[[Callable[[], tuple[_T] | None]], list[tuple[_T] | None]] = lambda attempt: [attempt()],
) -> list[_T]:
    """Call a function, with half as many rows each time that a device runs out of memory.

    Accelerate's `find_executable_batch_size` has no place for the other ranks, which have to run fewer rows too, and
    collects garbage before every call, of which a training run makes one per step. Its test of the error is used.

    Parameters
    ----------
    run : callable
        Takes the number of rows to run at a time, and has to start from the beginning.
    rows : int
        To begin with.
    say : callable
        Receives a line each time.
    splits : bool
        Whether batches can be split. Otherwise, and with one row, the error is raised.
    gather : callable
        Calls an attempt and returns what it returned on every rank: None where memory was short. By default there is
        one rank.

    Returns
    -------
    list
        What the function returned, by rank.

    Examples
    --------
    >>> def run(rows):
    ...     if rows > 2:
    ...         raise torch.OutOfMemoryError
    ...     return f"{rows} at a time"
    >>> halve_rows(run, 7, print)
    Out of memory: 4 sequences are run at a time from here on.
    Out of memory: 2 sequences are run at a time from here on.
    ['2 at a time']
    """

    def attempt() -> tuple[_T] | None:
        try:
            return (run(rows),)
        except RuntimeError as error:
            if rows == 1 or not splits or not _is_out_of_memory(error):
                raise
            return None

    while None in (results := gather(attempt)):
        from accelerate.utils.memory import clear_device_cache

        rows = (rows + 1) // 2
        clear_device_cache(garbage_collection=True)
        say(f"Out of memory: {rows} sequences are run at a time from here on.")
    return [result[0] for result in results if result is not None]


def _is_out_of_memory(error: RuntimeError) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
