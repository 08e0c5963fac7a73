"""Generators that are closed when their with statement ends."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def scoped(generator: Callable[_P, Generator[_T, None, None]]) -> Callable[_P, AbstractContextManager[Iterator[_T]]]:
    """Make a generator function a context manager that closes the generator however the with statement is left.

    A suspended generator lives as long as a traceback, which notebooks keep: a model would stay in evaluation mode,
    with hooks and without gradients.
    """

    @wraps(generator)
    @contextmanager
    def opened(*args: _P.args, **kwargs: _P.kwargs) -> Iterator[Iterator[_T]]:
        with closing(generator(*args, **kwargs)) as several:
            yield several

    return opened
