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
from streamline_hooks.core.threads import _users, require_unused


class Collecting(list[int]):
    """Users of a module whose reading collects garbage."""

    def __iter__(self) -> Any:
        gc.collect()
        return super().__iter__()


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
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    gc.collect()

    def use() -> None:
        abandoned(other)
        _users[id(model)] = Collecting()
        require_unused(model)  # collects while it holds the lock

    gc.disable()
    try:
        assert in_a_thread(use)
    finally:
        gc.enable()
        _users.pop(id(model), None)
    assert id(other) not in _users


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
    assert in_a_thread(elsewhere) and len(errors) == 2 and id(model) not in _users
