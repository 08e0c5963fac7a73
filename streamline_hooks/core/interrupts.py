"""Defer Ctrl-C in a distributed run, so that all ranks stop at the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from streamline_hooks.core.distributed import DistributedStep, current_processes

_T = TypeVar("_T")
SECOND_INTERRUPT_AFTER = 5.0  # seconds; a terminal and a launcher may both forward the same Ctrl-C


class AllInterrupted(BaseException):
    """Raised on all ranks after one of them was interrupted."""


class InterruptFlag:
    """Signal handler that records an interrupt of this process."""

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0

    def __call__(self, number: int, frame: Any) -> None:
        """Record the signal; raise KeyboardInterrupt if it is repeated later."""
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > SECOND_INTERRUPT_AFTER:
            raise KeyboardInterrupt


@contextmanager
def defer_interrupts() -> Iterator[InterruptFlag]:
    """Record Ctrl-C instead of raising in a distributed run, where the other ranks would wait for a rank that raised.

    A second Ctrl-C more than five seconds later raises. With one process, outside the main thread, or if another
    handler is installed, Ctrl-C is not deferred.
    """
    flag = InterruptFlag()
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if current_processes().count == 1 or not is_default or threading.current_thread() is not threading.main_thread():
        yield flag
        return
    signal.signal(signal.SIGINT, flag)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def gather_unless_interrupted(work: DistributedStep, interrupts: InterruptFlag, make: Callable[[], _T]) -> list[_T]:
    """Call a function on every rank and gather the results by rank.

    Raises AllInterrupted on every rank if a rank was interrupted, and KeyboardInterrupt with one process.
    """
    local_results: list[_T] = []
    try:
        requested = interrupts.requested
        if not requested:
            local_results.append(make())
    except KeyboardInterrupt:
        if work.processes.count == 1:
            raise
        requested = True
    gathered = work.all_gather_object((requested or interrupts.requested, local_results))
    if any(stop for stop, _ in gathered):
        raise AllInterrupted
    return [result for _, results in gathered for result in results]
