"""Whether one changed model retains more of its original than another, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.drawn_questions import Estimate, accuracies, estimate, share_kept
from streamline_hooks.evaluation.retained import TaskAnswers, answers_of, check_draws, grouped, not_clearly


@dataclass(frozen=True)
class Difference:
    """How much more the first of two changed models retains than the second, in one group of tasks.

    Attributes
    ----------
    ratio, above_chance, tasks, left_out
        Each as in `Retained`, the second's taken from the first's: 0.02 where one retains 0.90 and the other 0.88.
    """

    ratio: Estimate
    above_chance: Estimate | None
    tasks: Mapping[str, Estimate]
    left_out: Mapping[str, str]


def compared(
    first: Iterable[TaskAnswers],
    second: Iterable[TaskAnswers],
    *,
    clearly: float = 3.0,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """How much more one changed model retains than another of what their common original answers.

    The questions are drawn again, see `retained`, the same ones for all three models. So what both find hard does not
    make their difference unsure: its interval may well leave out 0 where the two models' own intervals overlap.

    Parameters
    ----------
    first, second : iterable of TaskAnswers
        The same tasks with the same answers of the original.
    clearly, draws, level, seed
        As in `retained`.

    Returns
    -------
    dict of str to Difference
        By group.

    Raises
    ------
    StreamlineError
        As `retained` does; or if the two were not asked the same, or are held against different originals.

    Examples
    --------
    >>> from streamline_hooks.evaluation.retained import retained
    >>> original, both = [True] * 90 + [False] * 10, [True] * 60 + [False] * 40
    >>> more = [True] * 66 + [False] * 34
    >>> one, other = (TaskAnswers("arc", original, changed, chance=0.25) for changed in (more, both))
    >>> retained([one])["classification"].above_chance.low < retained([other])["classification"].above_chance.high
    True
    >>> found = compared([one], [other])["classification"].above_chance
    >>> round(found.value, 4), found.low > 0  # 0.41/0.65 and 0.35/0.65
    (0.0923, True)
    """
    check_draws(clearly, draws, level, seed)
    sides = grouped(first), grouped(second)
    _check_alike(*sides)
    return {group: _of_group(named, sides[1][group], clearly, draws, level, seed) for group, named in sides[0].items()}


def _of_group(
    first: Mapping[str, TaskAnswers],
    second: Mapping[str, TaskAnswers],
    clearly: float,
    draws: int,
    level: float,
    seed: int,
) -> Difference:
    drawn = {
        name: accuracies(name, np.column_stack([answers_of(task), second[name].changed]), draws, seed, task.clusters)
        for name, task in sorted(first.items())
    }
    left_out = {name: reason for name, task in first.items() if (reason := not_clearly(task, clearly))}
    more = {name: _more(three, first[name].chance) for name, three in drawn.items() if name not in left_out}
    return Difference(
        estimate(_more(np.mean(list(drawn.values()), axis=0), 0.0), level),
        estimate(np.mean(list(more.values()), axis=0), level) if more else None,
        {name: estimate(more[name], level) for name in first if name in more},
        left_out,
    )


def _more(three: np.ndarray, chance: float) -> np.ndarray:
    before, one, other = three
    return cast(np.ndarray, share_kept(before, one, chance) - share_kept(before, other, chance))


def _check_alike(*sides: Mapping[str, Mapping[str, TaskAnswers]]) -> None:
    """Refuse two models that were not asked the same questions, or whose original answered otherwise."""
    asked = [{(group, name) for group, named in groups.items() for name in named} for groups in sides]
    if differing := sorted(name for _, name in asked[0] ^ asked[1]):
        raise StreamlineError(
            f"The two models were not both asked, in one group, the task {differing[0]!r}; expected the same tasks of "
            "both."
        )
    first, second = sides
    for group, named in first.items():
        for name, task in named.items():
            other = second[group][name]
            about = [(list(of.original), of.chance, list(of.clusters)) for of in (task, other)]
            if about[0] != about[1]:
                raise StreamlineError(
                    f"The original of the one model answers the task {name!r} otherwise than that of the other, or its "
                    "chance or clusters are others: both must be held against one original, in one precision, on the "
                    "same questions in the same order."
                )
