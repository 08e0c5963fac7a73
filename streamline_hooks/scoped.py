"""Generators that hold something open, and what closes them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def scoped(generator: Callable[_P, Generator[_T, None, None]]) -> Callable[_P, AbstractContextManager[Iterator[_T]]]:
    """Have a generator iterated over in a with statement, which ends what it holds open however it is left.

    A generator that an error or Ctrl-C leaves waiting lives as long as its traceback, which notebooks keep: until then
    a model would stay in evaluation, its hooks on, and gradients off everywhere.

    Examples
    --------
    >>> @scoped
    ... def numbers():
    ...     try:
    ...         yield from (1, 2, 3)
    ...     finally:
    ...         print("closed")
    >>> with numbers() as several:
    ...     next(several)
    1
    closed
    """

    @wraps(generator)
    @contextmanager
    def opened(*args: _P.args, **kwargs: _P.kwargs) -> Iterator[Iterator[_T]]:
        with closing(generator(*args, **kwargs)) as several:
            yield several

    return opened
