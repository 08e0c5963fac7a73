"""Whether a changed model has collapsed, in words: small problems that it no longer solves, texts in a ring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.writing import WritingScores, Written

LEVEL = 0.05
"""How often chance alone may be called a collapse, of problems and of texts."""
_KEPT = 0.5  # of what the original solves: who keeps as much has not collapsed
_RISE = 0.2  # of the share of repeated runs
_SHORTEST = 4  # tokens; a shorter text has no run that could be repeated


def sign_test(lost: int, won: int) -> float:
    """How likely chance alone is to lose so many of the pairs that differ, or more: the one-sided exact sign test.

    Of problems that are solved or not it is McNemar's exact test.

    Parameters
    ----------
    lost, won : int
        Pairs that speak for one side, and for the other; those that are equal do not count.

    Returns
    -------
    float

    Raises
    ------
    StreamlineError
        If a count is negative.

    Examples
    --------
    >>> sign_test(5, 0), sign_test(1, 1), sign_test(0, 0)
    (0.03125, 0.75, 1.0)
    """
    if min(lost, won) < 0:
        raise StreamlineError(f"Got lost={lost}, won={won}; expected two counts of 0 or more.")
    pairs = lost + won
    return sum(math.comb(pairs, k) for k in range(won + 1)) / 2**pairs


def fewest_solved(sorts: int) -> int:
    """How many problems an original has to solve for `collapse_of_probes` to be able to speak at all.

    Parameters
    ----------
    sorts : int

    Returns
    -------
    int

    Examples
    --------
    >>> fewest_solved(4)
    7
    """
    return next(count for count in range(64) if sign_test(count, 0) < LEVEL / (sorts + 1))


def fewest_texts() -> int:
    """How many texts `collapse_of_writing` needs to be able to speak at all.

    Examples
    --------
    >>> fewest_texts()
    5
    """
    return fewest_solved(0)


def collapse_of_probes(before: Mapping[str, Sequence[bool]], after: Mapping[str, Sequence[bool]]) -> str:
    """Say so where a changed model no longer solves what its original does.

    All problems together, or else single sorts, have collapsed where less than half is left of what the original
    solves, and chance alone would seldom lose as many of the same problems (`sign_test`). All looks together, one at
    all problems and one at each sort, call chance a collapse in at most 5 % of the cases. So an original that solves
    next to nothing is never said to have lost it.

    Parameters
    ----------
    before, after : mapping of str to sequence of bool
        By sort, whether each problem is solved; the same problems in one order.

    Returns
    -------
    str
        With the numbers; empty where nothing has collapsed.

    Raises
    ------
    StreamlineError
        If these are not the same problems.

    Examples
    --------
    >>> before = {"sums": [True] * 8, "copying": [True] * 6 + [False] * 2}
    >>> after = {"sums": [True] + [False] * 7, "copying": [False] * 8}
    >>> print(collapse_of_probes(before, after).partition(". ")[0])
    It solves 1 of 16 small generated problems, of which the original solves 14 (sums 8 -> 1, copying 6 -> 0)
    >>> collapse_of_probes(before, before)
    ''
    """
    if {name: len(one) for name, one in before.items()} != {name: len(one) for name, one in after.items()}:
        raise StreamlineError(
            f"The original was asked {_counted(before)}, the changed model {_counted(after)}; expected the same "
            "problems of both, in one order."
        )
    level = LEVEL / (len(before) + 1)
    all_before, all_after = _all(before), _all(after)
    counted = f"It solves {sum(all_after)} of {len(all_after)} small generated problems, of which the original solves "
    counted += f"{sum(all_before)}"
    moved = {name: f"{name} {sum(before[name])} -> {sum(after[name])}" for name in before}
    advice = (
        "Perplexity does not show this: remove fewer blocks or train the repair, and evaluate it on what you need it "
        "for."
    )
    if _collapsed(all_before, all_after, level):
        return f"{counted} ({', '.join(moved.values())}). {advice}"
    lost = [moved[name] for name in before if _collapsed(before[name], after[name], level)]
    return f"{counted}, but one sort is lost: {', '.join(lost)}. {advice}" if lost else ""


def collapse_of_writing(before: Sequence[Written], after: Sequence[Written]) -> str:
    """Say so where what a changed model writes goes round in a ring, or ends at once, and its original's does not.

    Texts have collapsed into repetition where the share of repeated runs of four tokens is 20 points above that of the
    original on average, and higher in so many of the texts that chance alone is that in less than 5 % of the cases
    (`sign_test`). They end at once where those with fewer than four tokens are so many more.

    Parameters
    ----------
    before, after : sequence of Written
        From the same prompts, in one order.

    Returns
    -------
    str
        With the numbers; empty where nothing has collapsed.

    Raises
    ------
    StreamlineError
        If the prompts are not the same.

    Examples
    --------
    >>> before = [Written("", "", tuple(range(64)), ended=False)] * 8
    >>> after = [Written("", "", (5,) * 64, ended=False)] * 8
    >>> print(collapse_of_writing(before, after).partition(". ")[0])
    It repeats itself: 98% of the runs of four tokens were there before, of the original's 0% (8 texts)
    """
    if [text.prompt for text in before] != [text.prompt for text in after]:
        raise StreamlineError(
            f"{len(before)} texts of the original and {len(after)} of the changed model are not of the same prompts "
            "in one order."
        )
    said = []
    short = [tuple(len(text.tokens) < _SHORTEST for text in pair) for pair in zip(before, after, strict=True)]
    sooner, later = sum(b and not a for a, b in short), sum(a and not b for a, b in short)
    if sign_test(sooner, later) < LEVEL:
        said.append(
            f"It writes next to nothing: {sum(b for _, b in short)} of {len(short)} texts end before the fourth token, "
            f"of the original's {sum(a for a, _ in short)}."
        )
    pairs = [pair for pair, ends in zip(zip(before, after, strict=True), short, strict=True) if not any(ends)]
    if pairs:
        theirs, mine = (WritingScores(tuple(texts)).repetition for texts in zip(*pairs, strict=True))
        more = sum(b.repetition > a.repetition for a, b in pairs)
        less = sum(b.repetition < a.repetition for a, b in pairs)
        if mine - theirs >= _RISE and sign_test(more, less) < LEVEL:
            said.append(
                f"It repeats itself: {mine:.0%} of the runs of four tokens were there before, of the original's "
                f"{theirs:.0%} ({len(pairs)} texts)."
            )
    return " ".join([*said, "Remove fewer blocks, or train the repair."]) if said else ""


def _collapsed(before: Sequence[bool], after: Sequence[bool], level: float) -> bool:
    pairs = list(zip(before, after, strict=True))
    lost, won = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return sum(after) < _KEPT * sum(before) and sign_test(lost, won) < level


def _all(sorts: Mapping[str, Sequence[bool]]) -> list[bool]:
    return [solved for one in sorts.values() for solved in one]


def _counted(sorts: Mapping[str, Sequence[bool]]) -> str:
    return ", ".join(f"{len(one)} of {name}" for name, one in sorts.items()) or "nothing"
