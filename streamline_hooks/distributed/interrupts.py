"""Ctrl-C in a distributed run: noted on the rank that receives it, so that all ranks stop at the same place."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from streamline_hooks.distributed.processes import DistributedStep, here

_T = TypeVar("_T")
SECONDS_OF_ONE_PRESS = 5.0  # seconds: a terminal and a launcher may both pass the same Ctrl-C on


class AllInterrupted(BaseException):
    """All ranks have agreed to stop, since one of them was interrupted."""


class Interrupts:
    """Whether this process was interrupted."""

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0

    def __call__(self, number: int, frame: Any) -> None:
        """Handle the signal: note it, and raise if it comes again later."""
        if self.asked and time.monotonic() - self._first > SECONDS_OF_ONE_PRESS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, time.monotonic()


@contextmanager
def noted_interrupts() -> Iterator[Interrupts]:
    """Note Ctrl-C instead of raising, in a distributed run.

    A rank that raised anywhere would leave the others waiting in a collective. A second Ctrl-C, more than five seconds
    after the first, raises all the same. With one process, outside the main thread, or where another handler is in
    place already, nothing is changed.

    Yields
    ------
    Interrupts

    Examples
    --------
    >>> with noted_interrupts() as interrupts:
    ...     interrupts.asked
    False
    """
    found = Interrupts()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if here().count == 1 or not usual or threading.current_thread() is not threading.main_thread():
        yield found
        return
    signal.signal(signal.SIGINT, found)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def agreed(work: DistributedStep, interrupts: Interrupts, make: Callable[[], _T]) -> list[_T]:
    """Call a function on every rank and gather what it returns, by rank.

    Raises
    ------
    AllInterrupted
        On every rank, if one was interrupted before or meanwhile.
    KeyboardInterrupt
        With one process.

    Examples
    --------
    >>> from streamline_hooks.distributed import Processes
    >>> agreed(DistributedStep("count", Processes()), Interrupts(), lambda: 5)
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
    told = work.all_gather_object((asked or interrupts.asked, made))
    if any(stop for stop, _ in told):
        raise AllInterrupted
    return [one for _, its in told for one in its]
