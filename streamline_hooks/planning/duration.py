"""Spans of time as they are written."""

from __future__ import annotations


def in_words(seconds: float) -> str:
    """A span of time for a terminal.

    Examples
    --------
    >>> in_words(42.0), in_words(630.0), in_words(9000.0)
    ('42 s', '10.5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
