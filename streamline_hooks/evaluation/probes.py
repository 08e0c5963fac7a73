"""Small problems that need no data set: sums, brackets, copying, counting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

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
USUAL = 4
"""The level of difficulty that is asked for unless another one is."""

Make = Callable[[Random], tuple[str, str]]


def probes(
    count: int = 50, *, seed: int = 0, shots: int = 4, difficulty: int | Mapping[str, int] = USUAL
) -> dict[str, list[Problem]]:
    """Make problems of each sort.

    What is asked for is shown by solved ones, so that a model which has only read text knows it too. No problem is the
    same as another of its sort, or as one that is shown. All of a sort stand behind the same shown ones: an interval
    from drawing problems anew is one for these. Of other seeds others are shown; put together, they are to be told as
    `TaskAnswers.clusters`.

    Parameters
    ----------
    count : int
        Problems of a sort.
    seed : int
        Decides what they are; those of a smaller count are the first of a larger one.
    shots : int
        Solved problems before each.
    difficulty : int or mapping of str to int
        The level of every sort, or of each by its name; a sort that is not named has the usual one, 4. What a small
        model solves at none of its levels, or always, says nothing of what it has lost: see `LEVELS` for what they are.

    Returns
    -------
    dict of str to list of Problem
        By sort: ``arithmetic`` (sums and differences; at the usual level of numbers below 100), ``brackets`` (what
        closes the open ones), ``copying`` (a row of words), ``counting`` (how often a word stands in a row; below
        level 3, which number comes next). Each answer is one line, see `STOP`.

    Raises
    ------
    StreamlineError
        If `count` is below 1 or `shots` negative, there is no such sort or level, or a level has not so many different
        problems.

    Examples
    --------
    >>> found = probes(2, shots=1)
    >>> sorted(found), len(found["brackets"])
    (['arithmetic', 'brackets', 'copying', 'counting'], 2)
    >>> easy = probes(1, shots=0, difficulty={"copying": 1})["copying"][0]
    >>> len(easy.answer.split())
    2
    """
    if count < 1 or shots < 0:
        raise StreamlineError(
            f"Got count={count}, shots={shots}; expected a count of 1 or more, and no negative shots."
        )
    asked = _levels(difficulty)
    return {name: _several(name, LEVELS[name][level], count, seed, shots) for name, level in asked.items()}


def _levels(difficulty: int | Mapping[str, int]) -> dict[str, int]:
    """The level of each sort."""
    given = difficulty if isinstance(difficulty, Mapping) else dict.fromkeys(LEVELS, difficulty)
    if unknown := sorted(set(given) - set(LEVELS)):
        raise StreamlineError(f"No sort of problems is called {', '.join(unknown)}; there is {', '.join(LEVELS)}.")
    for name, level in given.items():
        if isinstance(level, bool) or not isinstance(level, int) or level not in LEVELS[name]:
            raise StreamlineError(
                f"The sort {name} has no level {level!r} of difficulty; expected one of "
                f"{', '.join(map(str, LEVELS[name]))}."
            )
    return {name: given.get(name, USUAL) for name in LEVELS}


def _several(name: str, make: Make, count: int, seed: int, shots: int) -> list[Problem]:
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


def _sum(below: int) -> Make:
    def make(random: Random) -> tuple[str, str]:
        a, b = random.randrange(1, below), random.randrange(1, below)
        return f"{a} + {b} =", str(a + b)

    return make


def _arithmetic(least: int, below: int) -> Make:
    def make(random: Random) -> tuple[str, str]:
        a, b = random.randrange(least, below), random.randrange(least, below)
        if random.random() < 0.5:
            return f"{a} + {b} =", str(a + b)
        return f"{max(a, b)} - {min(a, b)} =", str(abs(a - b))

    return make


def _brackets(least: int, most: int, kinds: int) -> Make:
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


def _copying(least: int, most: int) -> Make:
    def make(random: Random) -> tuple[str, str]:
        words = " ".join(random.sample(_WORDS, random.randrange(least, most + 1)))
        return f"Say: {words} Again:", words

    return make


def _counting(most: int, others: int) -> Make:
    def make(random: Random) -> tuple[str, str]:
        word, *besides = random.sample(_WORDS, 3)
        times = random.randrange(1, most + 1)
        row = [word] * times + random.choices(besides, k=random.randrange(1, others + 1))
        random.shuffle(row)
        return f"Row: {' '.join(row)} How many {word}:", str(times)

    return make


def _next(*steps: int) -> Make:
    def make(random: Random) -> tuple[str, str]:
        first, step = random.randrange(1, 300), random.choice(steps)
        return f"Count: {' '.join(str(first + step * k) for k in range(4))} Next:", str(first + step * 4)

    return make


LEVELS: dict[str, dict[int, Make]] = {
    "arithmetic": {
        1: _sum(16),
        2: _sum(20),
        3: _sum(50),
        USUAL: _arithmetic(2, 100),
        5: _arithmetic(100, 1_000),
        6: _arithmetic(1_000, 10_000),
    },
    "brackets": {
        1: _brackets(3, 5, kinds=2),
        2: _brackets(2, 5, kinds=3),
        3: _brackets(4, 7, kinds=3),
        USUAL: _brackets(4, 10, kinds=3),
        5: _brackets(8, 14, kinds=3),
        6: _brackets(12, 20, kinds=3),
    },
    "copying": {
        1: _copying(2, 2),
        2: _copying(2, 3),
        3: _copying(3, 5),
        USUAL: _copying(3, 7),
        5: _copying(6, 8),
        6: _copying(9, 12),
    },
    "counting": {
        1: _next(1),
        2: _next(1, 2, 5, 10),
        3: _counting(2, others=2),
        USUAL: _counting(5, others=4),
        5: _counting(7, others=5),
        6: _counting(9, others=6),
    },
}
"""By sort, from easy to hard: sums of two numbers below 16, 20 and 50, then sums and differences of numbers of up to
two digits, and of three and four; up to 5 brackets of two kinds and of three, then up to 7, 10, 14 and 20; 2 words, up
to 3, 5, 7, 8 and 12; the next number in steps of one and of 1, 2, 5 or 10, then words that stand up to 2, 5, 7 and 9
times between others."""
