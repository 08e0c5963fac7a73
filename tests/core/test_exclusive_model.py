"""The registry of models in use never blocks the thread that holds it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from streamline_hooks import StreamlineError
from streamline_hooks.core import exclusive_model
from streamline_hooks.core.threads import require_unused


class CollectsGarbage(type):
    """A class whose name, which the registry reads for its error message, collects garbage."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        gc.collect()
        return "Collecting"


class Collecting(nn.Linear, metaclass=CollectsGarbage):
    pass


def abandoned(model: nn.Module) -> None:
    """Enter the context in a reference cycle, which only the garbage collector ends."""
    cycle: list[Any] = [exclusive_model(model)]
    cycle[0].__enter__()
    cycle.append(cycle)


def in_a_thread(function: Callable[[], None]) -> bool:
    """Whether the function returns."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(timeout=30)
    return not thread.is_alive()


def test_a_context_that_the_garbage_collector_ends_does_not_block() -> None:
    model, other, errors = Collecting(2, 2), nn.Linear(2, 2), []
    entered, done = threading.Event(), threading.Event()
    gc.collect()

    def hold() -> None:
        with exclusive_model(model):
            entered.set()
            done.wait()

    def use() -> None:
        abandoned(other)
        try:
            require_unused(model)  # reads the name of the class while it holds the lock
        except StreamlineError as error:
            errors.append(error)

    threading.Thread(target=hold, daemon=True).start()
    assert entered.wait(timeout=30)
    gc.disable()
    try:
        assert in_a_thread(use)
    finally:
        gc.enable()
        done.set()
    assert len(errors) == 1 and "Collecting" in str(errors[0])
    require_unused(other)  # by this thread, which is not the one that entered


def test_another_thread_is_refused_and_nested_uses_end_in_turn() -> None:
    model, errors = nn.Sequential(nn.Linear(2, 2)), []

    def elsewhere() -> None:
        try:
            require_unused(model)
        except StreamlineError as error:
            errors.append(error)

    with exclusive_model(model):
        with exclusive_model(model[0]):
            assert in_a_thread(elsewhere) and len(errors) == 1
        assert in_a_thread(elsewhere) and len(errors) == 2
        with pytest.raises(ZeroDivisionError), exclusive_model(model):
            raise ZeroDivisionError
    assert in_a_thread(elsewhere) and len(errors) == 2
