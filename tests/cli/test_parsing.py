"""The short forms of the command line."""

from __future__ import annotations

import pytest

from streamline_hooks import StreamlineError, Target
from streamline_hooks.cli.parsing import parse_criterion, parse_search, parse_target
from streamline_hooks.selection import DisjointSearch, WindowSearch


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
    with pytest.raises(StreamlineError, match=rf"{text!r}.*Expected.*parameters:0.25.*Choose"):
        parse_target(text)


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "2.5", "1.0", "nan", "parameters:0", "parameters:1", "latency:1.2", "latency:-0.5", "latency:nan"],
)
def test_amounts_out_of_range(text: str) -> None:
    with pytest.raises(StreamlineError, match=r"(?s)=.*Expected.*(Give|Pass)"):
        parse_target(text)


def test_searches() -> None:
    assert parse_search("window") == WindowSearch()
    assert parse_search(" disjoint : windows=3 , shortlist=4") == DisjointSearch(windows=3, shortlist=4)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("disjiont", "'disjiont'.*Did you mean 'disjoint'"),
        ("window:windows=3", "'windows'.*Expected one of shortlist .int."),
        ("disjoint:criterion=kl", "'criterion'.*Expected one of shortlist .int., windows .int."),
        ("disjoint:keep=1", "'keep'.*Expected one of"),
        ("disjoint:windows=two", "windows='two'.*Expected int"),
        ("disjoint:windows=0", "windows=0.*at least 1"),
    ],
)
def test_texts_that_are_no_search(text: str, named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        parse_search(text)


@pytest.mark.parametrize(
    ("text", "criterion"),
    [
        ("kl", "kl"),
        (" cosine ", "cosine"),
        ("1*cosine", "cosine"),
        ("cosine+kl", {"cosine": 1.0, "kl": 1.0}),
        ("cosine + 0.5*relative_magnitude", {"cosine": 1.0, "relative_magnitude": 0.5}),
        ("2 * cosine", {"cosine": 2.0}),
    ],
)
def test_criteria(text: str, criterion: object) -> None:
    assert parse_criterion(text) == criterion


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cosinus", "'cosinus'.*Did you mean 'cosine'"),
        ("", "criterion ''.*Expected one of cosine"),
        ("cosine +", "criterion ''.*Expected one of cosine"),
        ("cosine*0.5", "criterion '0.5'.*Expected one of cosine"),
        ("half*cosine", "weight 'half'.*Write 0.5[*]cosine"),
        ("0*cosine + kl", "weight '0'.*above 0"),
        ("inf*cosine", "weight 'inf'.*above 0"),
        ("-1*cosine", "weight '-1'.*above 0"),
        ("nan*cosine", "weight 'nan'.*above 0"),
        ("*cosine", "weight ''.*above 0"),
        ("cosine + 2*cosine", "'cosine' occurs twice.*Add up"),
    ],
)
def test_texts_that_are_no_criterion(text: str, named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        parse_criterion(text)
