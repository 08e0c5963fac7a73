"""What this library raises: one public exception, and one kind of it."""

from __future__ import annotations


class StreamlineError(ValueError):
    """Something was asked for that cannot be done.

    Public functions raise it for arguments and files that they cannot use: wrong types and values, models without
    weights, batches that a model does not take, damaged files. Python raises its own TypeError for a call that does not
    match a function's signature. The text says what was given, what was expected, and what to do.
    """


class TrainingInterrupted(StreamlineError):
    """Raised if a training run was interrupted (Ctrl-C); the message names the checkpoint. The exit code is 130."""


class UnsupportedSurgery(StreamlineError):
    """A block cannot be removed or replaced in this model without changing what the others compute.

    The text names the block and what depends on it.

    Attributes
    ----------
    cause : str
        A short name of the reason, for programs; see `LayerSurgeon.check`.
    """

    def __init__(self, text: str, cause: str = "") -> None:
        super().__init__(text)
        self.cause = cause
