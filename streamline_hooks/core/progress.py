"""Show progress bars, and log on rank 0."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from streamline_hooks.core.distributed import current_processes

_HIDDEN = ContextVar("_HIDDEN", default=False)


@contextmanager
def hide_progress() -> Iterator[None]:
    """Hide progress bars and log messages below the level of warnings inside the context."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; only rank 0 logs messages below the level of warnings."""
    logger = logging.getLogger(name)
    logger.addFilter(_is_shown)
    return logger


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not (current_processes().rank or _HIDDEN.get())


def progress_bar(total: int, desc: str, unit: str = "tok", done: int = 0) -> tqdm[Any]:
    """Return a tqdm progress bar that counts tokens; ``TQDM_DISABLE=1`` hides it.

    Only rank 0 shows the bar, which counts the tokens of rank 0.

    Parameters
    ----------
    total : int
        Number of tokens.
    desc : str
        Label of the bar.
    unit : str
        Unit of the counter.
    done : int
        Tokens that are done at the start.

    Returns
    -------
    tqdm.tqdm

    Examples
    --------
    >>> with hide_progress(), progress_bar(10, "scoring") as bar:
    ...     _ = bar.update(4)
    """
    options: dict[str, Any] = {"initial": done, "unit_scale": True, "dynamic_ncols": True, "mininterval": 0.5}
    if current_processes().rank or _HIDDEN.get():  # otherwise the environment variable decides
        options["disable"] = True
    return tqdm(total=total, desc=desc, unit=unit, **options)
