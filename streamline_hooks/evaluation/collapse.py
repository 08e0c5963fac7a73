"""Warnings of a collapse: small problems that are no longer solved, and texts that repeat themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from streamline_hooks.evaluation.writing import WritingScores, Written

LEVEL = 0.05
"""How often chance alone may be called a collapse, of problems and of texts."""
_KEPT = 0.5  # of what the original solves: who keeps as much has not collapsed
_RISE = 0.2  # of the share of repeated runs
_SHORTEST = 4  # tokens; a shorter text has no run that could be repeated


def sign_test(lost: int, won: int) -> float:
    """Return the p-value of the one-sided exact sign test (of problems that are solved or not, McNemar's exact test).

    Parameters
    ----------
    lost, won : int
        Pairs that differ in the one direction and in the other.

    Examples
    --------
    >>> sign_test(5, 0), sign_test(1, 1), sign_test(0, 0)
    (0.03125, 0.75, 1.0)
    """
    pairs = lost + won
    return sum(math.comb(pairs, k) for k in range(won + 1)) / 2**pairs


def fewest_solved(sorts: int) -> int:
    """Return how many problems an original must solve for `collapse_of_probes` to be able to find a collapse."""
    return next(count for count in range(64) if sign_test(count, 0) < LEVEL / (sorts + 1))


def fewest_texts() -> int:
    """Return how many texts `collapse_of_writing` needs to be able to find a collapse."""
    return fewest_solved(0)


def collapse_of_probes(before: Mapping[str, Sequence[bool]], after: Mapping[str, Sequence[bool]]) -> str:
    """Return a warning if a changed model no longer solves what its original does; empty otherwise.

    All problems together, or else a single sort, have collapsed if less than half is left of what the original solves
    and the loss of the same problems is significant (`sign_test`). All tests together, one of all problems and one per
    sort, have a false-positive rate of 5 % at most. An original that solves next to nothing cannot collapse.

    Parameters
    ----------
    before, after : mapping of str to sequence of bool
        By sort, whether each problem is solved; the same problems in one order.
    """
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
    """Return a warning if a changed model's texts repeat themselves or end at once, unlike its original's.

    Texts repeat themselves if the share of repeated runs of four tokens is 20 points above that of the original on
    average, and significantly often higher (`sign_test`, 5 %). They end at once if significantly more have fewer than
    four tokens.

    Parameters
    ----------
    before, after : sequence of Written
        From the same prompts, in one order.
    """
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
