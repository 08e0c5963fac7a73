"""Ctrl-C is noted where there are several processes, and raises as ever where there is one."""

from __future__ import annotations

import os
import signal
import time

import pytest

from streamline_hooks.core import interrupts
from streamline_hooks.core.distributed import Processes
from streamline_hooks.core.interrupts import defer_interrupts


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


@pytest.fixture()
def of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "current_processes", lambda: Processes(1, 2))


def test_with_one_process_it_raises() -> None:
    with pytest.raises(KeyboardInterrupt), defer_interrupts() as noted:
        press()
    assert not noted.requested


def test_with_several_it_is_noted_and_a_later_second_one_raises(of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with defer_interrupts() as noted:
        assert not noted.requested
        press()
        press()  # the launcher passes the same one on
        assert noted.requested
        monkeypatch.setattr(interrupts, "SECOND_INTERRUPT_AFTER", -1.0)
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_is_left_in_place(of_two: None) -> None:
    before, seen = signal.getsignal(signal.SIGINT), []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with defer_interrupts() as noted:
            press()
        assert seen == [signal.SIGINT] and not noted.requested
    finally:
        signal.signal(signal.SIGINT, before)
