"""Ctrl-C where several processes work together: noted, so that they can stop at the same place."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from streamline_hooks.distributed.processes import here

SECONDS_OF_ONE_PRESS = 5.0  # seconds: a terminal and a launcher may both pass the same Ctrl-C on


class Interrupts:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0

    def __call__(self, number: int, frame: Any) -> None:
        """Handle the signal: note it, and raise where it comes again later."""
        if self.asked and time.monotonic() - self._first > SECONDS_OF_ONE_PRESS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, time.monotonic()


@contextmanager
def noted_interrupts() -> Iterator[Interrupts]:
    """Note Ctrl-C instead of raising, where there are several processes.

    One that raised anywhere would leave the others waiting in whatever they do together. A second Ctrl-C, more than
    five seconds after the first, raises all the same. With one process, outside the main thread, or where another
    handler is in place already, nothing is changed.

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
