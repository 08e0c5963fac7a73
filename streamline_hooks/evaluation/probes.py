"""Small problems that need no data set: sums, brackets, copying, counting."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.problems import Problem

_WORDS = (
    *("apple", "river", "stone", "cloud", "table", "green", "seven", "light", "paper", "horse", "music", "window"),
    *("garden", "silver", "winter", "bridge", "candle", "forest", "island", "letter", "market", "needle", "orange"),
    *("pencil", "rocket", "saddle", "tunnel", "valley", "yellow", "basket", "copper", "dinner"),
)
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_PATIENCE = 200  # problems in a row that were there before
STOP = ("\n",)
"""Where an answer ends."""

Make = Callable[[Random], tuple[str, str]]


@checked(count=1, shots=0)
def probes(count: int = 50, *, seed: int = 0, shots: int = 4) -> dict[str, list[Problem]]:
    """Make generated problems of each sort, which need no data set.

    Each follows solved ones of its sort, the same for all, so that a base model can solve it too; an interval from
    resampling the problems holds for these. No two problems of a sort are the same.

    Parameters
    ----------
    count : int
        Problems of a sort.
    seed : int
        The problems of a smaller count are the first of a larger one.
    shots : int
        Solved problems before each.

    Returns
    -------
    dict of str to list of Problem
        By sort: ``arithmetic`` (sums and differences of numbers below 100), ``brackets`` (what closes the open ones),
        ``copying`` (a row of words), ``counting`` (how often a word occurs in a row). Each answer is one line,
        see `STOP`.

    Raises
    ------
    StreamlineError
        If a sort has not so many different problems.

    Examples
    --------
    >>> found = probes(2, shots=1)
    >>> sorted(found), len(found["brackets"])
    (['arithmetic', 'brackets', 'copying', 'counting'], 2)
    """
    return {name: problems_of(name, make, count, seed, shots) for name, make in SORTS.items()}


def problems_of(name: str, make: Make, count: int, seed: int, shots: int) -> list[Problem]:
    """Make problems of one sort, see `probes`; `make` draws a question and its answer."""
    random, seen = Random(f"{seed} {name}"), dict[str, str]()
    in_vain = 0
    while len(seen) < shots + count:
        question, answer = make(random)
        in_vain = in_vain + 1 if question in seen else 0
        seen[question] = answer
        if in_vain > _PATIENCE:
            raise StreamlineError(
                f"There are not {shots + count} different problems of the sort {name}; ask for fewer."
            )
    pairs = list(seen.items())
    shown = "".join(f"{question} {answer}\n" for question, answer in pairs[:shots])
    return [
        Problem(shown + question, answer, "line", f"{name}, number {k}")
        for k, (question, answer) in enumerate(pairs[shots:], start=1)
    ]


def arithmetic(least: int, below: int) -> Make:
    """Draw sums and differences of numbers from `least` to below `below`."""

    def make(random: Random) -> tuple[str, str]:
        a, b = random.randrange(least, below), random.randrange(least, below)
        if random.random() < 0.5:
            return f"{a} + {b} =", str(a + b)
        return f"{max(a, b)} - {min(a, b)} =", str(abs(a - b))

    return make


def brackets(least: int, most: int, kinds: int) -> Make:
    """Draw open brackets of so many kinds, from `least` to `most` in a row."""
    opening = list(_PAIRS)[:kinds]

    def make(random: Random) -> tuple[str, str]:
        opened: list[str] = []
        text = ""
        for _ in range(random.randrange(least, most + 1)):
            if opened and random.random() < 0.4:
                text += _PAIRS[opened.pop()]
            else:
                opened.append(random.choice(opening))
                text += opened[-1]
        if not opened:
            opened.append(random.choice(opening))
            text += opened[-1]
        return f"Open: {' '.join(text)} Close:", " ".join(_PAIRS[one] for one in reversed(opened))

    return make


def copying(least: int, most: int) -> Make:
    """Draw rows of `least` to `most` words."""

    def make(random: Random) -> tuple[str, str]:
        words = " ".join(random.sample(_WORDS, random.randrange(least, most + 1)))
        return f"Say: {words} Again:", words

    return make


def counting(most: int, others: int) -> Make:
    """Draw rows in which a word stands up to `most` times, between up to `others` others."""

    def make(random: Random) -> tuple[str, str]:
        word, *besides = random.sample(_WORDS, 3)
        times = random.randrange(1, most + 1)
        row = [word] * times + random.choices(besides, k=random.randrange(1, others + 1))
        random.shuffle(row)
        return f"Row: {' '.join(row)} How many {word}:", str(times)

    return make


SORTS: dict[str, Make] = {
    "arithmetic": arithmetic(2, 100),
    "brackets": brackets(4, 10, kinds=3),
    "copying": copying(3, 7),
    "counting": counting(5, others=4),
}
