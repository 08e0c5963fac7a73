"""Level switching: one unit comes back, another of its kind goes, and nothing else."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from streamline_hooks.branches import BRANCHES
from streamline_hooks.selection.search import Selection
from streamline_hooks.selection.search.levels import UNITS, Gone, Levels, gone_of, selection_of


@st.composite
def situations(draw: st.DrawFn) -> tuple[Levels, Gone]:
    """What may go in a stack, and something of it that is gone."""
    length = draw(st.integers(2, 8))
    blocks = frozenset(draw(st.sets(st.integers(0, length - 1), min_size=1)))
    halves = [(k, branch) for k in sorted(blocks) for branch in BRANCHES]
    levels = Levels(blocks, frozenset(draw(st.sets(st.sampled_from(halves)))))
    gone: set[tuple[int, str]] = set()
    for k in sorted(blocks):
        own = [[], [(k, b) for b in BRANCHES], *([half] for half in halves if half[0] == k and half in levels.singles)]
        gone.update(draw(st.sampled_from(own)))
    assume(gone)
    return levels, frozenset(gone)  # type: ignore[arg-type]


@given(situations(), st.integers())
def test_a_mutation_keeps_the_budget_and_takes_only_what_may_go(drawn: tuple[Levels, Gone], seed: int) -> None:
    levels, gone = drawn
    child = levels.mutated(gone, Random(seed))
    assert Counter(branch for _, branch in child) == Counter(branch for _, branch in gone)
    selection = selection_of(child)
    assert selection.blocks <= levels.blocks and set(selection.silenced) <= levels.singles
    assert child == levels.mutated(gone, Random(seed))


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # in many situations nothing can move
@given(situations(), st.sampled_from(UNITS), st.integers())
def test_a_switch_is_of_one_unit(drawn: tuple[Levels, Gone], unit: str, seed: int) -> None:
    levels, gone = drawn
    assume(all(levels.movable(gone, unit)))  # type: ignore[arg-type]
    child = levels.switched(gone, unit, Random(seed))  # type: ignore[arg-type]
    kinds = BRANCHES if unit == "block" else (unit,)
    back, up = gone - child, child - gone
    assert {b for _, b in back} == {b for _, b in up} == set(kinds) and len(back) == len(up) == len(kinds)
    assert len({k for k, _ in back}) == len({k for k, _ in up}) == 1


@given(situations())
def test_a_selection_and_what_is_gone_are_the_same(drawn: tuple[Levels, Gone]) -> None:
    _, gone = drawn
    selection = selection_of(gone, 0.5)
    assert gone_of(selection) == gone and selection.score == 0.5
    assert not any((k, b) in gone for k, _ in selection.silenced for b in BRANCHES if (k, b) not in selection.silenced)


def test_every_other_choice_of_blocks_can_be_reached() -> None:
    levels = Levels(frozenset({0, 2, 3, 5}), frozenset())
    seen, random, gone = set(), Random(0), gone_of(Selection.of_blocks([0, 2]))
    for _ in range(300):
        gone = levels.mutated(gone, random)
        seen.add(frozenset(selection_of(gone).blocks))
    assert len(seen) == 6


def test_branches_alone_are_reached_from_blocks_and_left_again() -> None:
    halves = frozenset((k, b) for k in range(4) for b in BRANCHES)
    levels = Levels(frozenset(range(4)), halves)
    random, gone, kinds = Random(1), gone_of(Selection.of_blocks([1])), []
    for _ in range(60):
        gone = levels.mutated(gone, random)
        kinds.append(len(selection_of(gone).silenced))
    assert {0, 2} == set(kinds)


def test_nothing_else_to_switch_to() -> None:
    gone = gone_of(Selection.of_blocks([1, 2]))
    assert Levels(frozenset({1, 2}), frozenset()).mutated(gone, Random(0)) == gone
