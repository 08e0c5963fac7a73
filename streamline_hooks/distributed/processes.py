"""Which process this is, of how many, and what is its share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Processes:
    """One process among those that work together.

    Attributes
    ----------
    rank : int
        Its number, from 0.
    count : int
        How many there are.

    Examples
    --------
    >>> Processes(rank=1, count=2).share(["a", "b", "c", "d", "e"])
    ['b', 'd']
    """

    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """Give this process's items: every one is in the share of exactly one process.

        Nothing is repeated to make shares equal. They differ by one item at most, and are empty where there are fewer
        items than processes.
        """
        return list(items)[self.rank :: self.count]


def here() -> Processes:
    """Say which process this is.

    Those that work together are the ones of the default process group, which ``accelerate`` and
    `torch.distributed.init_process_group` make; without one, and inside `alone`, this is the only one.

    Examples
    --------
    >>> here()
    Processes(rank=0, count=1)
    """
    distributed = torch.distributed
    if _ALONE.get() or not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Let this process do everything by itself, though it belongs to a group: for what only one of them is to do.

    Examples
    --------
    >>> with alone():
    ...     here().count
    1
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)
