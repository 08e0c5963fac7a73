"""Spans of time as they are written."""

from __future__ import annotations

import pytest

from streamline_hooks import StreamlineError
from streamline_hooks.cli.short_forms import parse_duration
from streamline_hooks.planning.duration import in_words


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10m", 600), ("1h", 3600), ("90s", 90), ("1h30m", 5400), (" 1.5H ", 5400), ("1h 2m 3s", 3723), ("0h5m", 300)],
)
def test_a_span_of_time_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "-5m", "1d", "10m1h", "", "0m", "1:30", "ten minutes", "1e3s", "5mm"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(StreamlineError, match=r"Expected.*10m.*1h"):
        parse_duration(text)


def test_in_words() -> None:
    assert [in_words(s) for s in (0.4, 119.0, 120.0, 7199.0, 7200.0)] == [
        "0 s",
        "119 s",
        "2.0 min",
        "120.0 min",
        "2.0 h",
    ]
