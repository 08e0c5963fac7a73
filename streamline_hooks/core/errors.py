"""Exceptions of this library: StreamlineError and its subclasses."""

from __future__ import annotations


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
