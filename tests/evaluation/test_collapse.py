"""What counts as a collapse, as tables: counts in, words or nothing out."""

from __future__ import annotations

import itertools
import math
import re
from random import Random

import pytest

from streamline_hooks.evaluation.collapse import collapse_of_probes, collapse_of_writing, fewest_solved, sign_test
from streamline_hooks.evaluation.writing import Written

SORTS = ("arithmetic", "brackets", "copying", "counting")


def solved(*counts: int) -> dict[str, list[bool]]:
    """So many of the eight of each sort, the first ones."""
    return {name: [k < count for k in range(8)] for name, count in zip(SORTS, counts, strict=True)}


def texts(*repetitions: float) -> list[Written]:
    """Texts of 103 tokens, of whose 100 runs of four such a share is repeated."""
    made = []
    for k, share in enumerate(repetitions):
        repeated = round(100 * share)
        tokens = (*([7] * (repeated + 4 if repeated else 0)), *range(100, 300))[:103]
        made.append(Written(f"prompt {k}", "", tokens, ended=False))
        assert round(made[-1].repetition, 2) == share
    return made


@pytest.mark.parametrize(("lost", "won"), list(itertools.product(range(6), range(6))))
def test_the_sign_test_counts_all_ways_that_a_coin_can_fall(lost: int, won: int) -> None:
    throws = list(itertools.product((0, 1), repeat=lost + won))
    assert sign_test(lost, won) == sum(sum(one) >= lost for one in throws) / len(throws)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((5, 0, 8, 4), (1, 0, 2, 0), r"solves 3 of 32.*original solves 17.*"
         r"arithmetic 5 -> 1, brackets 0 -> 0, copying 8 -> 2, counting 4 -> 0"),
        ((8, 8, 8, 8), (0, 0, 0, 0), r"solves 0 of 32.*original solves 32 \("),
        ((8, 8, 8, 8), (8, 0, 8, 8), r"solves 24 of 32.*original solves 32.*one sort is lost: brackets 8 -> 0"),
        ((0, 0, 7, 0), (0, 0, 0, 0), r"solves 0 of 32.*original solves 7 \("),
        ((0, 0, 6, 0), (0, 0, 0, 0), ""),  # an original that solves next to nothing
        ((0, 0, 0, 0), (0, 0, 0, 0), ""),
        ((2, 1, 2, 0), (0, 0, 0, 0), ""),
        ((5, 0, 8, 4), (5, 0, 8, 4), ""),
        ((0, 0, 0, 0), (8, 8, 8, 8), ""),
        ((8, 8, 8, 8), (4, 4, 4, 4), ""),  # clearly worse, but half is left
        ((8, 8, 8, 8), (8, 2, 8, 8), ""),  # of one sort by itself eight are few: 6 lost of 8 may be chance
    ],
)  # fmt: skip
def test_problems_that_are_no_longer_solved(before: tuple[int, ...], after: tuple[int, ...], words: str) -> None:
    said = collapse_of_probes(solved(*before), solved(*after))
    assert re.search(words, said) and bool(said) == bool(words)


def test_other_problems_solved_instead_are_no_collapse() -> None:
    """The pairs decide: sixteen of the original's are lost, but seven others won in their place."""
    before = {"sums": [True] * 16 + [False] * 16}
    after = {"sums": [False] * 16 + [True] * 7 + [False] * 9}
    same = {"sums": [True] * 7 + [False] * 25}
    assert collapse_of_probes(before, same) and not collapse_of_probes(before, after)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_noise_is_seldom_called_a_collapse(share: float) -> None:
    """Two models that are equally good, and whose answers have nothing to do with each other."""
    random = Random(0)

    def drawn() -> dict[str, list[bool]]:
        return {name: [random.random() < share for _ in range(8)] for name in SORTS}

    assert sum(bool(collapse_of_probes(drawn(), drawn())) for _ in range(2000)) <= 0.05 * 2000


def test_fewer_than_the_fewest_never_say_anything() -> None:
    assert fewest_solved(4) == 7
    assert collapse_of_probes(solved(0, 0, 7, 0), solved(0, 0, 0, 0))
    assert not collapse_of_probes(solved(0, 0, 6, 0), solved(0, 0, 0, 0))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((0.0,) * 8, (0.9,) * 8, r"repeats itself: 90%.*original's 0% \(8 texts\).*Remove fewer blocks.*train"),
        ((0.3,) * 8, (0.9,) * 7 + (0.1,), "repeats itself: 80%"),
        ((0.3,) * 8, (0.45,) * 8, ""),  # higher in each, but by little
        ((0.0,) * 8, (0.9,) * 3 + (0.0,) * 5, ""),  # much higher on average, but in three texts alone
        ((0.3,) * 8, (0.9,) * 6 + (0.1,) * 2, ""),
        ((0.9,) * 8, (0.0,) * 8, ""),
        ((0.9,) * 8, (0.9,) * 8, ""),
        ((0.1,) * 4, (0.9,) * 4, ""),  # four texts are too few to tell
    ],
)  # fmt: skip
def test_texts_that_go_round(before: tuple[float, ...], after: tuple[float, ...], words: str) -> None:
    said = collapse_of_writing(texts(*before), texts(*after))
    assert re.search(words, said) and bool(said) == bool(words)


def test_texts_that_end_at_once() -> None:
    """They have no repetition at all, which must not pass for a good sign."""
    before = texts(*(0.1,) * 8)
    after = [Written(text.prompt, "", (), ended=True) for text in before]
    assert re.search(r"next to nothing.*8 of 8 texts.*original's 0", collapse_of_writing(before, after))
    assert math.isnan(after[0].repetition) and not collapse_of_writing(after, after)
    assert not collapse_of_writing(after, before)
