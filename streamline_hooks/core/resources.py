"""Retry with fewer rows after running out of memory; measure time and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from streamline_hooks.core.progress import get_logger

logger = get_logger(__name__)

_T = TypeVar("_T")


def retry_with_fewer_rows(
    run: Callable[[int], _T],
    rows: int,
    *,
    splits: bool = True,
    gather: Callable[[Callable[[], tuple[_T] | None]], list[tuple[_T] | None]] = lambda attempt: [attempt()],
) -> list[_T]:
    """Call a function, and repeat with half as many rows each time a device runs out of memory.

    `run` takes the number of rows to process at a time; each new number is logged. With one row, or if `splits` is
    False, the error is raised. `gather` calls an attempt and returns the results of all ranks, with None for a rank
    that ran out of memory. Returns the results by rank.

    Accelerate's `find_executable_batch_size` does not synchronize ranks and collects garbage before every call, which
    is too slow for one call per training step. Only its test of the error is used.
    """

    def attempt() -> tuple[_T] | None:
        try:
            return (run(rows),)
        except RuntimeError as error:
            from accelerate.utils.memory import should_reduce_batch_size

            is_out_of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
            if rows == 1 or not splits or not is_out_of_memory:
                raise
            return None

    while None in (results := gather(attempt)):
        from accelerate.utils.memory import clear_device_cache

        rows = (rows + 1) // 2
        clear_device_cache(garbage_collection=True)
        logger.info(f"Out of memory: continuing with {rows} sequences at a time.")
    return [result[0] for result in results if result is not None]


class StepTimer:
    """Measure the seconds spent in named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Add the seconds spent inside the context to a step."""
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started


def model_size(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters of a model and their size in bytes."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def peak_memory() -> int | None:
    """Return the peak memory of this process in bytes, or None if the system does not report it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
