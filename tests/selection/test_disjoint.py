"""Disjoint windows and single blocks, against every choice there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError, compress
from streamline_hooks.selection import protected_blocks, windows_of_size
from streamline_hooks.selection.search_algorithms import disjoint_windows, one_shot
from streamline_hooks.selection.selection import Selection, best_windows
from streamline_hooks.testing import tiny_model
from tests.configured import arguments

Table = dict[tuple[int, int], float]


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, Table, list[int]]:
    """A length, a score of every window (sums of small integers are exact), and blocks to keep."""
    length = draw(st.integers(2, 8))
    values = st.integers(-9, 9).map(float) | st.just(-math.inf)
    table = {(a, b): draw(values) for a in range(length) for b in range(a + 1, length + 1)}
    return length, table, draw(st.lists(st.integers(-length, length - 1), max_size=2))


def by(table: Table) -> Callable[[Sequence[range]], list[float]]:
    return lambda windows: [table[w.start, w.stop] for w in windows]


def every_selection(length: int, count: int, keep: list[int]) -> list[Selection]:
    free = sorted(set(range(length)) - protected_blocks(keep, length))
    return [Selection.of_blocks(blocks) for blocks in itertools.combinations(free, count)]


@given(tables(), st.data())
def test_disjoint_windows_are_the_best_of_all(drawn: tuple[int, Table, list[int]], data: st.DataObject) -> None:
    length, table, keep = drawn
    count = data.draw(st.integers(1, length - 1))
    parts, best = data.draw(st.integers(1, count)), data.draw(st.integers(1, 6))
    shortest = data.draw(st.integers(1, count // parts))
    expected = [
        (-sum(table[w.start, w.stop] for w in s.windows), [(w.start, w.stop) for w in s.windows])
        for s in every_selection(length, count, keep)
        if len(s.windows) == parts and all(table[w.start, w.stop] > -math.inf and len(w) >= shortest for w in s.windows)
    ]
    if not expected:
        with pytest.raises(StreamlineError, match=rf"{parts} windows.*of {count}"):
            disjoint_windows(by(table), length, count, parts, protect=keep, shortest=shortest)
        return
    found = disjoint_windows(by(table), length, count, parts, protect=keep, best=best, shortest=shortest)
    assert [(-s.score, [(w.start, w.stop) for w in s.windows]) for s in found] == sorted(expected)[:best]


@given(tables(), st.data())
def test_one_window_is_the_best_window(drawn: tuple[int, Table, list[int]], data: st.DataObject) -> None:
    length, table, _ = drawn
    count = data.draw(st.integers(1, length - 1))
    assume(any(table[a, a + count] > -math.inf for a in range(length - count + 1)))
    found = best_windows(by(table), windows_of_size(length, count))
    assert disjoint_windows(by(table), length, count, 1, best=length) == found


@given(tables(), st.data())
def test_one_shot_takes_the_best_blocks(drawn: tuple[int, Table, list[int]], data: st.DataObject) -> None:
    length, table, keep = drawn
    count, best = data.draw(st.integers(1, length - 1)), data.draw(st.integers(1, 6))
    expected = [
        (-sum(table[k, k + 1] for k in s.blocks), sorted(s.blocks))
        for s in every_selection(length, count, keep)
        if all(table[k, k + 1] > -math.inf for k in s.blocks)
    ]
    if not expected:
        with pytest.raises(StreamlineError, match=f"{count} of {length} blocks"):
            one_shot(by(table), length, count, protect=keep)
        return
    found = one_shot(by(table), length, count, protect=keep, best=best)
    assert [(-s.score, sorted(s.blocks)) for s in found] == sorted(expected)[:best]


def test_a_score_is_asked_for_once_and_for_no_protected_block() -> None:
    asked: list[list[range]] = []

    def score(windows: Sequence[range]) -> list[float]:
        asked.append(list(windows))
        return [0.0] * len(windows)

    disjoint_windows(score, 8, 4, 2, protect=[3, -1])
    one_shot(score, 8, 4, protect=[3, -1])
    assert len(asked) == 2 and not any({3, 7} & set(window) for windows in asked for window in windows)
    assert max(map(len, asked[0])) == 3  # with a second window, no longer one can be a part of 4 blocks


@pytest.mark.parametrize(
    ("count", "parts", "best", "text"),
    [
        (4, 5, 1, r"5 windows of 4 blocks"),
        (8, 2, 1, "one block must stay"),
        (0, 1, 1, "remove=0.*Pass"),
        (6, 4, 1, r"4 windows of 6 blocks.*8 blocks.*\(none\)"),
    ],
)
def test_choices_that_do_not_exist(count: int, parts: int, best: int, text: str) -> None:
    with pytest.raises(StreamlineError, match=text):
        disjoint_windows(lambda windows: [0.0] * len(windows), 8, count, parts, best=best)


def test_a_stack_of_eighty_blocks_takes_no_time() -> None:
    asked: list[int] = []

    def score(windows: Sequence[range]) -> list[float]:
        asked.append(len(windows))
        return [math.sin(7 * w.start + 3 * w.stop) for w in windows]

    assert len(disjoint_windows(score, 80, 24, 3, best=8)) == 8
    assert asked == [80 * 22 - 22 * 21 // 2]


def test_windows_are_longer_than_what_stands_in_their_place() -> None:
    """One of a single block would be taken for another block, and nothing would go there."""
    rows = torch.randint(3, 60, (12, 2, 12), generator=torch.Generator().manual_seed(0))
    parts: dict[str, Any] = {"calibration": list(rows[:8]), "validation": [rows[8]], "test": [rows[9]]}
    options: dict[str, Any] = {
        "search": "disjoint",
        "repair": "merged",
        "remove": 3,
        "speed": False,
        "generation": False,
    }
    result = compress(tiny_model("llama", blocks=10), parts, **arguments(shortlist=8, **options))
    assert len(result.candidates) == 8
    assert all(len(w) > 1 and not one.refused for one in result.candidates for w in one.windows)
    with pytest.raises(StreamlineError, match=r"7 blocks.*4 windows of at least 2"):
        compress(tiny_model("llama", blocks=10), parts, **arguments(**{**options, "windows": 4}))
