"""Whether one model retains more than another: by hand, what must hold always, and drawing apart, which hides it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation import Difference, TaskAnswers, compared, retained


def answers(right: int, of: int) -> list[bool]:
    return [k < right for k in range(of)]


def three(count: int, seed: int) -> list[list[bool]]:
    """An original, one that says nine tenths of it, and one that says nine tenths of that."""
    random = np.random.default_rng(seed)
    found = [random.random(count) < 0.8]
    for _ in range(2):
        found.append(np.where(random.random(count) < 0.9, found[-1], random.random(count) < 0.5))
    found[0][0] = True  # of nothing, nothing is retained
    return [side.tolist() for side in found]


def sides(*several: tuple[int, int], chance: float = 0.25) -> tuple[list[TaskAnswers], list[TaskAnswers]]:
    """The two models' answers to some tasks, each of so many questions with a seed."""
    found: tuple[list[TaskAnswers], list[TaskAnswers]] = ([], [])
    for number, (count, seed) in enumerate(several):
        original, one, other = three(count, seed)
        for side, changed in zip(found, (one, other), strict=True):
            side.append(TaskAnswers(f"task {number}", original, changed, chance))
    return found


def only(first: Sequence[TaskAnswers], second: Sequence[TaskAnswers], **options: Any) -> Difference:
    (found,) = compared(first, second, **{"draws": 1000, **options}).values()
    return found


def test_by_hand() -> None:
    """Of 0.8 above chance 0.3 the one keeps 0.7 and the other 0.5; of all of 1.0 one keeps 0.4 and the other 0.6."""
    first = [
        TaskAnswers("a", answers(80, 100), answers(65, 100), 0.3),
        TaskAnswers("b", answers(50, 50), answers(20, 50)),
    ]
    second = [
        TaskAnswers("b", answers(50, 50), answers(30, 50)),
        TaskAnswers("a", answers(80, 100), answers(55, 100), 0.3),
    ]
    found = only(first, second)
    assert found.above_chance is not None
    assert {name: one.value for name, one in found.tasks.items()} == pytest.approx({"a": 0.2, "b": -0.2})
    assert found.above_chance.value == pytest.approx(0.0)
    assert found.ratio.value == pytest.approx((0.65 + 0.4 - 0.55 - 0.6) / 1.8)
    guessed = [TaskAnswers("c", answers(52, 100), answers(50, 100), 0.5)]
    known = only(first + guessed, second + guessed)
    assert known.left_out == {"c": "where the original's 52.0% ± 5.0% is not clearly above the chance of 50.0%"}
    assert list(known.tasks) == ["a", "b"] and known.above_chance == found.above_chance
    assert only(guessed, guessed).above_chance is None


SEVERAL = st.lists(st.tuples(st.integers(10, 60), st.integers(0, 10_000)), min_size=1, max_size=3)


@given(SEVERAL, st.integers(0, 5))
def test_it_is_what_the_one_retains_less_what_the_other_does(several: list[tuple[int, int]], seed: int) -> None:
    first, second = sides(*several)
    found, back = only(first, second, seed=seed), only(second, first, seed=seed)
    each = [retained(side, draws=100)["classification"] for side in (first, second)]
    assert found.ratio.value == pytest.approx(each[0].ratio.value - each[1].ratio.value)
    assert found.left_out == each[0].left_out
    for name, one in found.tasks.items():
        assert one.value == pytest.approx(each[0].tasks[name].value - each[1].tasks[name].value)
    pairs = [(found.ratio, back.ratio), *((one, back.tasks[name]) for name, one in found.tasks.items())]
    for one, other in pairs:
        assert one.value == pytest.approx(-other.value) and one.undefined == other.undefined
        assert one.low <= one.value + 1e-12 and one.value <= one.high + 1e-12


@given(SEVERAL)
def test_between_a_model_and_itself_there_is_no_difference(several: list[tuple[int, int]]) -> None:
    first, _ = sides(*several)
    found = only(first, first, draws=100)
    for each in (found.ratio, *found.tasks.values()):
        # Of a few questions a draw may leave nothing that could be retained.
        assert each.value == 0.0 and (each.undefined > 0 or (each.low, each.high) == (0.0, 0.0))


def test_questions_drawn_for_each_model_apart_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: one model answers some questions more, and none less, and it would not be told."""
    original, other = three(300, 5)[:2]
    one = [better or k % 12 == 0 for k, better in enumerate(other)]
    first, second = ([TaskAnswers("a", original, changed)] for changed in (one, other))
    found = only(first, second).ratio
    assert found.value > 0 and found.low > 0

    module = sys.modules[compared.__module__]
    paired = module.accuracies

    def apart(name: str, answers: np.ndarray, draws: int, seed: int, clusters: Any) -> np.ndarray:
        return np.concatenate([paired(name, side[:, None], draws, seed + k) for k, side in enumerate(answers.T)])

    monkeypatch.setattr(module, "accuracies", apart)
    unpaired = only(first, second).ratio
    assert unpaired.value == pytest.approx(found.value) and unpaired.low < 0 < found.low


def test_an_interval_holds_as_often_as_it_says() -> None:
    """Of 200 draws from two models of which the one is 5 points better, some 90 % hold these 5 points."""
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        both, more = random.random(400) < 0.6, random.random(400) < 0.125  # of the other 0.4
        first, second = ([TaskAnswers("a", [True] * 400, side.tolist())] for side in (both | more, both))
        one = only(first, second, draws=200, level=0.9).ratio
        held += one.low <= 0.05 <= one.high
    assert 165 <= held <= 195


def test_what_cannot_be_compared() -> None:
    first, second = sides((20, 1), (20, 2))
    others, _ = sides((20, 3), (20, 2))
    moved = [TaskAnswers(task.name, task.original, task.changed, 0.5) for task in second]
    together = [TaskAnswers(task.name, task.original, task.changed, 0.25, clusters=[1, 2] * 10) for task in second]
    for several, text in (
        (second[:1], r"'task 1'.*expected"),
        (others, r"one model.*'task 0' otherwise"),
        (together, "chance or clusters are others"),
        (moved, r"'task 0' otherwise.*chance or clusters are others"),
        ([], "no task"),
    ):
        with pytest.raises(StreamlineError, match=text):
            compared(first, several)
    with pytest.raises(StreamlineError, match="100 draws or more"):
        compared(first, second, draws=10)
