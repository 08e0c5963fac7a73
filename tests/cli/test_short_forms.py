"""The short forms of the command line."""

from __future__ import annotations

import pytest

from streamline_hooks import StreamlineError, Target
from streamline_hooks.cli.short_forms import parse_target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("8", Target(blocks=8)),
        ("8.0", Target(blocks=8)),
        ("blocks:8", Target(blocks=8)),
        ("0.25", Target(fraction=0.25)),
        (" 25% ", Target(fraction=0.25)),
        ("parameters:0.25", Target(parameters=0.25)),
        ("parameters: 25%", Target(parameters=0.25)),
        ("latency:0.8", Target(latency=0.8)),
        ("decode-latency:80%", Target(decode_latency=0.8)),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert parse_target(text) == parse_target(str(target)) == target


@pytest.mark.parametrize("text", ["", "eight", "parameters", "parameters:", ":0.5", "speed:0.5", "latency:0.5:1", "%"])
def test_texts_that_are_no_target(text: str) -> None:
    with pytest.raises(StreamlineError, match=rf"{text!r}.*Expected.*parameters:0.25.*Give"):
        parse_target(text)


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "2.5", "1.0", "nan", "parameters:0", "parameters:1", "latency:1.2", "latency:-0.5", "latency:nan"],
)
def test_amounts_out_of_range(text: str) -> None:
    with pytest.raises(StreamlineError, match=r"(?s)=.*Expected.*Give"):
        parse_target(text)
