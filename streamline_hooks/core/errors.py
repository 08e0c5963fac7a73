"""Exceptions of this library, StreamlineError and its subclasses, and warnings."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


class StreamlineError(ValueError):
    """Raised for invalid arguments, unsupported models and unreadable files.

    Public functions raise it for wrong types and values, models without weights, batches that do not fit the model, and
    damaged files. A call that does not match a function's signature raises Python's TypeError. The message states the
    value, the accepted values, and the remedy.
    """


class TrainingInterrupted(StreamlineError):
    """Raised if a training run was interrupted (Ctrl-C).

    The message names the checkpoint to resume from. The exit code of the command line is 130.
    """


class UnsupportedSurgery(StreamlineError):
    """Raised if removing or replacing a block would change what the remaining blocks compute.

    The message names the block and what depends on it.

    Parameters
    ----------
    text : str
        The message.
    cause : str
        Short name of the reason for use in programs, see `LayerSurgeon.check`.

    Examples
    --------
    >>> try:
    ...     raise UnsupportedSurgery("Block 0 computes the position bias of the other blocks.", "shared")
    ... except StreamlineError as error:
    ...     print(error.cause)
    shared
    """

    def __init__(self, text: str, cause: str = "") -> None:
        super().__init__(text)
        self.cause = cause


def warn_caller(text: str) -> None:
    """Issue a UserWarning that names the line of the first caller outside this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _is_between(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _is_between(file: str) -> bool:
    """Whether a frame of this file is in the package, or enters one of its context managers."""
    return file.startswith(_PACKAGE) or file.endswith("contextlib.py")
