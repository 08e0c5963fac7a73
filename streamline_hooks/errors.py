"""What this library raises: one public exception, and one kind of it."""

from __future__ import annotations


class StreamlineError(ValueError):
    """Something was asked for that cannot be done.

    The text says what was given, what was expected, and what to do.
    """


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
