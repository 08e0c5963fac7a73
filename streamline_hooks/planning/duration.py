"""Spans of time as they are written."""

from __future__ import annotations

import re

from streamline_hooks.errors import StreamlineError

_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}\s*h)?\s*(?:{_NUMBER}\s*m)?\s*(?:{_NUMBER}\s*s)?", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Read a span of time such as ``10m``, ``8h``, ``90s`` or ``1h30m``.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    StreamlineError
        If it is none.

    Examples
    --------
    >>> parse_duration("10m"), parse_duration("1h30m"), parse_duration("90s")
    (600.0, 5400.0, 90.0)
    """
    found = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in (found.groups() if found else (0, 0, 0)))
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise StreamlineError(
            f"{text!r} is no span of time; expected one above zero, with its units: 10m, 1h, 90s or 1h30m."
        )
    return total


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
