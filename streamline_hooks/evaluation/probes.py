"""Small problems that need no data set: sums, brackets, copying, counting."""

from __future__ import annotations

from collections.abc import Callable
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


def probes(count: int = 50, *, seed: int = 0, shots: int = 4) -> dict[str, list[Problem]]:
    """Make problems of each sort.

    What is asked for is shown by solved ones, so that a model which has only read text knows it too. No problem is the
    same as another of its sort, or as one that is shown.

    Parameters
    ----------
    count : int
        Problems of a sort.
    seed : int
        Decides what they are; those of a smaller count are the first of a larger one.
    shots : int
        Solved problems before each.

    Returns
    -------
    dict of str to list of Problem
        By sort: ``arithmetic`` (sums and differences of numbers below 100), ``brackets`` (what closes the open ones),
        ``copying`` (a row of words), ``counting`` (how often a word stands in a row). Each answer is one line, see
        `STOP`.

    Raises
    ------
    StreamlineError
        If `count` is below 1 or `shots` negative.

    Examples
    --------
    >>> found = probes(2, shots=1)
    >>> sorted(found), len(found["brackets"])
    (['arithmetic', 'brackets', 'copying', 'counting'], 2)
    """
    if count < 1 or shots < 0:
        raise StreamlineError(
            f"Got count={count}, shots={shots}; expected a count of 1 or more, and no negative shots."
        )
    return {name: _several(name, make, count, seed, shots) for name, make in _SORTS.items()}


def _several(name: str, make: Callable[[Random], tuple[str, str]], count: int, seed: int, shots: int) -> list[Problem]:
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


def _arithmetic(random: Random) -> tuple[str, str]:
    a, b = random.randrange(2, 100), random.randrange(2, 100)
    if random.random() < 0.5:
        return f"{a} + {b} =", str(a + b)
    return f"{max(a, b)} - {min(a, b)} =", str(abs(a - b))


def _brackets(random: Random) -> tuple[str, str]:
    opened: list[str] = []
    text = ""
    for _ in range(random.randrange(4, 11)):
        if opened and random.random() < 0.4:
            text += _PAIRS[opened.pop()]
        else:
            opened.append(random.choice(list(_PAIRS)))
            text += opened[-1]
    if not opened:
        opened.append(random.choice(list(_PAIRS)))
        text += opened[-1]
    return f"Open: {' '.join(text)} Close:", " ".join(_PAIRS[one] for one in reversed(opened))


def _copying(random: Random) -> tuple[str, str]:
    words = " ".join(random.sample(_WORDS, random.randrange(3, 8)))
    return f"Say: {words} Again:", words


def _counting(random: Random) -> tuple[str, str]:
    word, *others = random.sample(_WORDS, 3)
    times = random.randrange(1, 6)
    row = [word] * times + random.choices(others, k=random.randrange(1, 5))
    random.shuffle(row)
    return f"Row: {' '.join(row)} How many {word}:", str(times)


_SORTS = {"arithmetic": _arithmetic, "brackets": _brackets, "copying": _copying, "counting": _counting}
