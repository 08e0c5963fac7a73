"""The last n, the last n before the final block, and a throw of the dice that comes out the same each time."""

from __future__ import annotations

from functools import partial

import pytest

from streamline_hooks.selection.criteria import CRITERIA, Criterion, random_score, register_criterion
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.statistics import Profile

PROFILE = Profile(9)  # of 8 blocks; nothing has been counted, and nothing has to be


def order(name: str, length: int) -> list[int]:
    windows = [range(a, a + length) for a in range(8 - length + 1)]
    scores = score_windows(name, windows, profile=PROFILE)
    return sorted(range(len(windows)), key=lambda k: -scores[k])


def test_the_last_n_go_first() -> None:
    assert order("last_n", 3) == [5, 4, 3, 2, 1, 0]
    assert order("last_n_but_final", 3) == [4, 3, 2, 1, 0, 5]
    assert order("last_n_but_final", 8) == [0]


def test_random_is_the_same_each_time_and_another_for_each_seed() -> None:
    windows = [range(a, b) for b in range(1, 9) for a in range(b)]
    scores = score_windows("random", windows, profile=PROFILE)
    assert scores == score_windows("random", windows[::-1], profile=PROFILE)[::-1]
    assert len(set(scores)) == len(windows) and all(0 <= s < 1 for s in scores)
    assert 0.35 < sum(scores) / len(scores) < 0.65
    assert scores[:2] == pytest.approx([random_score(PROFILE, range(0, 1)), random_score(PROFILE, range(0, 2))], abs=0)
    try:
        register_criterion(Criterion("random-1", partial(random_score, seed=1), "profile"))
        assert set(scores).isdisjoint(score_windows("random-1", windows, profile=PROFILE))
    finally:
        CRITERIA.pop("random-1", None)
