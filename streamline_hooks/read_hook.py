"""Hooks on one module that copies of it carry along without effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ReadHook:
    """A forward hook or pre-hook that reads.

    A deep copy, an unpickled one, or one that shares the original's hooks must not write into the original's
    records. Gradient checkpointing runs a block once more during the backward; that is not another visit.

    Parameters
    ----------
    watched : torch.nn.Module, optional
        The module that the hook is registered on.
    read : callable, optional
        Given what the hook is given after the module; what it returns is not used.

    Examples
    --------
    >>> linear, seen = nn.Linear(2, 2), []
    >>> _ = linear.register_forward_hook(ReadHook(linear, lambda args, output: seen.append(output.shape)))
    >>> _ = linear(torch.zeros(3, 2))
    >>> seen
    [torch.Size([3, 2])]
    """

    def __init__(self, watched: nn.Module | None = None, read: Callable[..., Any] | None = None) -> None:
        self._watched, self._read = watched, read

    def __call__(self, module: nn.Module, *given: Any) -> None:
        """Read, unless it is another module or a backward that runs."""
        if module is self._watched and self._read is not None and not in_backward():
            self._read(*given)

    def __reduce__(self) -> tuple[type[ReadHook], tuple[()]]:
        return type(self), ()


class ChangeHook(ReadHook):
    """A forward hook or pre-hook whose result takes the place of what it was given.

    It is called also where gradient checkpointing runs a block once more: what is run then must be what was run before.

    Examples
    --------
    >>> identity = nn.Identity()
    >>> _ = identity.register_forward_hook(ChangeHook(identity, lambda args, output: output + 1))
    >>> identity(torch.zeros(1))
    tensor([1.])
    """

    def __init__(self, watched: nn.Module | None = None, change: Callable[..., Any] | None = None) -> None:
        super().__init__(watched, change)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Change, unless it is another module."""
        return self._read(*given) if module is self._watched and self._read is not None else None


def in_backward() -> bool:
    """Whether a backward runs, in which gradient checkpointing runs blocks once more; a compiler is told no."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
