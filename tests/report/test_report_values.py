"""How numbers are said: always a number or a dash."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.report.values import (
    DASH,
    SPACE,
    Scale,
    change,
    gone,
    in_words,
    number,
    percent,
    silent,
    times,
    whole,
)

NOTHING = [None, math.nan, math.inf, -math.inf, "12", True, [1.0]]


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_what_is_no_number_is_a_dash(value: object) -> None:
    said = [number(value), whole(value), percent(value), times(value), change(value, 1.0), change(1.0, value)]
    assert {*said, Scale.of([value]).say(value)} == {DASH}


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [
        (0, 2, "0.00"), (0.0049, 2, "4.9e−03"), (0.005, 2, "0.01"), (-0.25, 2, "−0.25"), (9.999, 2, "10.00"),
        (99.99, 2, "99.99"), (99.996, 2, "100.0"), (175.72, 2, "175.7"), (999.94, 3, "999.9"), (999.96, 2, "1,000"),
        (2029.4, 2, "2,029"), (1_000_000, 2, "1.0e+06"), (1e-300, 2, "1.0e−300"), (12, 0, "12"),
    ],
)  # fmt: skip
def test_numbers(value: float, digits: int, said: str) -> None:
    assert number(value, digits) == said


@example(1.75e308, 0)
@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 6))
def test_a_number_is_said_within_its_digits(value: float, digits: int) -> None:
    said = number(value, digits)
    assert not any(word in said.lower() for word in ("nan", "inf"))
    if math.isfinite(value):
        read, meant = Decimal(said.replace("−", "-").replace(",", "")), Decimal(value)  # 1.8e308 is no float any more
        assert abs(read - meant) <= max(Decimal("0.06") * max(abs(read), abs(meant)), Decimal("0.51") / 10**digits)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1_500_000_000, 2], "1.5 billion"),
        ([106_523_712], "106.5 million"),
        ([999_999], "1,000.0 thousand"),
        ([12], "12 "),
    ],
)
def test_scales(values: list[float], said: str) -> None:
    scale = Scale.of(values)
    assert f"{scale.say(values[0])} {scale.word}" == said


def test_a_change_has_its_sign() -> None:
    assert (change(100, 75), change(100, 125)) == (f"−25.0{SPACE}%", f"+25.0{SPACE}%")


def test_windows_in_words() -> None:
    assert in_words([(2, 10)]) == "2–9"
    assert in_words([(2, 3), (5, 7)], [(9, "mlp")]) == "2, 5–6, mlp of 9"
    assert in_words([]) == "none"
    with pytest.raises(StreamlineError, match="come in order"):
        in_words([(5, 7), (2, 3)])


def test_what_went_is_the_first_candidates_and_else_the_plans() -> None:
    plan = {"removed": [2, 3, 7], "silenced": [[9, "attention"]]}
    first = {"windows": [[4, 6]], "silenced": []}
    assert gone({"plan": plan}) == [(2, 4), (7, 8)] and silent({"plan": plan}) == [(9, "attention")]
    assert gone({"plan": plan, "candidates": [first]}) == [(4, 6)]
    assert silent({"plan": plan, "candidates": [first]}) == []
    assert gone({}) == [] and silent({}) == []
