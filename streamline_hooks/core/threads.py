"""Keep threads apart that change global state of the process or run the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from streamline_hooks.core.errors import StreamlineError

_global_state = threading.RLock()
# Reentrant: a garbage collection while the lock is held may end another `exclusive_model` in this thread.
_registry = threading.RLock()
_users: dict[int, list[int]] = {}  # by the id of a module: the threads that run it, once for each nested use


@contextmanager
def exclusive_global_state() -> Iterator[None]:
    """Let other threads wait that enter this context.

    For code that changes global state of the process for a short time: torch's default random generator, Python's
    warning filters, log levels, PyTorch's backend flags.
    """
    with _global_state:
        yield


@contextmanager
def exclusive_model(*models: nn.Module) -> Iterator[None]:
    """Refuse the use of models, or of any of their modules, by two threads at the same time.

    For code that temporarily changes modes, attributes or hooks of a model, which a second thread would observe or
    restore too early. Nested uses by one thread are allowed.
    """
    thread = threading.get_ident()
    modules = {id(module): module for model in models for module in model.modules()}
    with _registry:
        _require_unused(modules, models, thread)
        for key in modules:
            users = _users.setdefault(key, [])
            users.append(thread)
            _users[key] = users  # a garbage collection may have removed the empty list
    try:
        yield
    finally:
        with _registry:
            for key in modules:
                users = _users.get(key, [])
                if thread in users:
                    users.remove(thread)
                if not users:
                    _users.pop(key, None)


def require_unused(model: nn.Module) -> None:
    """Raise if another thread is inside `exclusive_model` with this model or with a part of it."""
    modules = {id(module): module for module in model.modules()}
    with _registry:
        _require_unused(modules, (model,), threading.get_ident())


def _require_unused(modules: dict[int, nn.Module], models: tuple[nn.Module, ...], thread: int) -> None:
    if any(user != thread for key in modules for user in _users.get(key, ())):
        names = ", ".join(type(model).__name__ for model in models)
        raise StreamlineError(
            f"Another thread is running this {names}, whose modes, attributes and hooks are changed until it is done. "
            "Expected one thread per model at a time. Wait for the other thread, for example with a threading.Lock, "
            "or give each thread its own model: copy.deepcopy(model)."
        )
