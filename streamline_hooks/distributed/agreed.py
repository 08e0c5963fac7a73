"""What every process makes, unless one of them was asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from streamline_hooks.distributed.interrupts import Interrupts
from streamline_hooks.distributed.together import Together

_T = TypeVar("_T")


class AllInterrupted(BaseException):
    """All processes have agreed to stop, since one of them was asked to."""


def agreed(work: Together, interrupts: Interrupts, make: Callable[[], _T]) -> list[_T]:
    """Make something in every process; what each of them made, by its number.

    Raises
    ------
    AllInterrupted
        In all processes, if one was asked to stop, before or meanwhile.
    KeyboardInterrupt
        With one process.

    Examples
    --------
    >>> from streamline_hooks.distributed import Processes
    >>> agreed(Together("count", Processes()), Interrupts(), lambda: 5)
    [5]
    """
    made: list[_T] = []
    try:
        asked = interrupts.asked
        if not asked:
            made.append(make())
    except KeyboardInterrupt:
        if work.processes.count == 1:
            raise
        asked = True
    told = work.tell((asked or interrupts.asked, made))
    if any(stop for stop, _ in told):
        raise AllInterrupted
    return [one for _, its in told for one in its]
