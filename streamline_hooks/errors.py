"""What this library raises: one public exception, and one kind of it."""


class StreamlineError(ValueError):
    """Something was asked for that cannot be done.

    The text says what was given, what was expected, and what to do.
    """


class UnsupportedSurgery(StreamlineError):
    """A block cannot be removed or replaced in this model without changing what the others compute.

    The text names the block and what depends on it.
    """
