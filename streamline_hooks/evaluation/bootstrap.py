"""Relative accuracy with confidence intervals, and paired comparisons of two models, by a bootstrap over items."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError

DRAWS_AT_ONCE = 1 << 22  # counts that are drawn at a time


@dataclass(frozen=True)
class TaskAnswers:
    """Scores of two models on the same items of a task.

    Attributes
    ----------
    name : str
    original, changed : sequence of bool or float
        By item, 0 to 1.
    chance : float
        Accuracy without any knowledge; 0 where nothing can be guessed.
    group : str
        Tasks of different groups, such as classification and generation, are reported separately.
    clusters : sequence of hashable
        For each item, its cluster (the same passage, the same solved examples), which is drawn as a whole; empty for
        independent items.
    """

    name: str
    original: Sequence[bool] | Sequence[float]
    changed: Sequence[bool] | Sequence[float]
    chance: float = 0.0
    group: str = "classification"
    clusters: Sequence[Hashable] = ()


@dataclass(frozen=True)
class Estimate:
    """A statistic with its bootstrap interval.

    Attributes
    ----------
    value, low, high : float
        With the percentile interval; −∞ and ∞ if too many draws are undefined.
    standard_error : float
        Standard deviation of the draws.
    undefined : float
        Share of the draws in which the original is no better than chance, which lie outside of the interval.
    """

    value: float
    low: float
    high: float
    standard_error: float
    undefined: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class Difference:
    """How much more of its original one changed model retains than another, in one group of tasks; see `Retained`."""

    ratio: Estimate
    above_chance: Estimate | None
    tasks: Mapping[str, Estimate]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Retained(Difference):
    """Relative accuracy of a changed model in one group of tasks.

    Attributes
    ----------
    ratio : Estimate
        Mean accuracy over the tasks divided by the original's.
    above_chance : Estimate or None
        Mean over `tasks` of (accuracy − chance) / (original accuracy − chance); None without such a task.
    tasks : dict of str to Estimate
        The same of each task on which the original is clearly above chance.
    left_out : dict of str to str
        The other tasks, and why.
    """

    def __str__(self) -> str:
        count = f"{len(self.tasks)} of {len(self.tasks) + len(self.left_out)} tasks"
        without = "".join(f"; without {name}, {reason}" for name, reason in self.left_out.items())
        above = f"{self.above_chance} above chance" if self.above_chance else "nothing above chance"
        return f"{self.ratio} of the mean accuracy, {above} ({count}{without})"


@checked(clearly=0, draws=100, level="(0, 1)", seed=0)
def retained(
    tasks: Iterable[TaskAnswers], *, clearly: float = 3.0, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, Retained]:
    """Compute the relative accuracy of a changed model by group of tasks, with intervals.

    `Retained.ratio` is the number of LLM-Streamline (arXiv 2403.19135) and of most papers on pruning. It credits
    guessing, which `Retained.above_chance` does not. Both models' items are resampled together, so that items which are
    hard for both do not widen the interval. The draws of a task depend on its name and the seed alone.

    Parameters
    ----------
    tasks : iterable of TaskAnswers
    clearly : float
        Standard errors above chance that the original must reach for a task to enter `Retained.above_chance`.
    draws : int
        Bootstrap draws, at least 100.
    level : float
        Coverage of the intervals.
    seed : int

    Raises
    ------
    StreamlineError
        If a setting or task is invalid, two tasks have one name, or the original scores 0 in a whole group.

    Examples
    --------
    >>> original, changed = [True] * 80 + [False] * 20, [True] * 70 + [False] * 30
    >>> found = retained([TaskAnswers("arc", original, changed, chance=0.25)])["classification"]
    >>> round(found.ratio.value, 4), round(found.above_chance.value, 4)  # 0.7/0.8 and 0.45/0.55
    (0.875, 0.8182)
    """
    groups = _by_group(tasks)
    return {group: Retained(*_statistics(named, None, clearly, draws, level, seed)) for group, named in groups.items()}


@checked(clearly=0, draws=100, level="(0, 1)", seed=0)
def compared(
    first: Iterable[TaskAnswers],
    second: Iterable[TaskAnswers],
    *,
    clearly: float = 3.0,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compute how much more of its original one changed model retains than another: a paired bootstrap.

    The items of all three models are resampled together, so the interval may exclude 0 where the two models' own
    intervals overlap. The parameters are those of `retained`; both models need the same tasks and original.

    Examples
    --------
    >>> original, both = [True] * 90 + [False] * 10, [True] * 60 + [False] * 40
    >>> more = [True] * 66 + [False] * 34
    >>> one, other = (TaskAnswers("arc", original, changed, chance=0.25) for changed in (more, both))
    >>> found = compared([one], [other])["classification"].above_chance
    >>> round(found.value, 4), found.low > 0  # 0.41/0.65 and 0.35/0.65
    (0.0923, True)
    """
    settings = (clearly, draws, level, seed)
    one, other = _by_group(first), _by_group(second)
    _require_same(one, other)
    return {group: Difference(*_statistics(named, other[group], *settings)) for group, named in one.items()}


def _statistics(
    named: Mapping[str, TaskAnswers],
    other: Mapping[str, TaskAnswers] | None,
    clearly: float,
    draws: int,
    level: float,
    seed: int,
) -> tuple[Estimate, Estimate | None, dict[str, Estimate], dict[str, str]]:
    """Return the fields of `Retained`, or with the tasks of another changed model those of `Difference`."""
    drawn = {}
    for name, task in sorted(named.items()):  # sums in one order
        scores = [task.original, task.changed, *([] if other is None else [other[name].changed])]
        drawn[name] = accuracies(name, np.asarray(scores, dtype=float).T, draws, seed, task.clusters)
    left_out = {name: reason for name, task in named.items() if (reason := _why_left_out(task, clearly))}
    shares = {name: _share(rows, named[name].chance) for name, rows in drawn.items() if name not in left_out}
    return (
        _estimate(_share(np.mean(list(drawn.values()), axis=0), 0.0), level),
        _estimate(np.mean(list(shares.values()), axis=0), level) if shares else None,
        {name: _estimate(shares[name], level) for name in named if name in shares},
        left_out,
    )


def _estimate(values: np.ndarray, level: float) -> Estimate:
    """Make an estimate of a value and its draws, some of which may be NaN."""
    value, drawn = float(values[0]), values[1:]
    undefined = np.isnan(drawn)
    defined, last = drawn[~undefined], len(drawn) - 1
    cut = int(last * (1.0 - level) / 2.0)
    low = np.sort(np.where(undefined, -np.inf, drawn))[cut]
    high = np.sort(np.where(undefined, np.inf, drawn))[last - cut]
    error = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return Estimate(value, float(low), float(high), error, float(undefined.mean()))


def accuracies(name: str, scores: np.ndarray, draws: int, seed: int, clusters: Sequence[Hashable] = ()) -> np.ndarray:
    """Return the accuracy of each model on the items as they are, and then on each bootstrap draw.

    Items (or clusters) with the same scores of all models are drawn together: their counts are multinomial. The draws
    depend on the task's name and the seed.

    Returns
    -------
    numpy.ndarray
        Shape (models, 1 + draws), for scores of shape (items, models).
    """
    kinds, counts = np.unique(_sums(scores, clusters), axis=0, return_counts=True)
    total = int(counts.sum())
    random = np.random.default_rng([seed, *name.encode()])
    found = [_means(counts[None], kinds)]
    for start in range(0, draws, step := max(1, DRAWS_AT_ONCE // len(kinds))):
        found.append(_means(random.multinomial(total, counts / total, size=min(step, draws - start)), kinds))
    return np.concatenate(found, axis=1)


def _sums(scores: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Return the sums of each cluster's scores by model, and in the last column its number of items."""
    counted = np.column_stack([scores, np.ones(len(scores))])
    if not len(clusters):
        return counted
    number = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    found = np.zeros((len(number), counted.shape[1]))
    np.add.at(found, [number[cluster] for cluster in clusters], counted)
    return found


def _means(drawn: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    *sums, counts = kinds.T
    items = (drawn * counts).sum(axis=1)
    return np.stack([(drawn * kind).sum(axis=1) / items for kind in sums])


def _share(accuracy: np.ndarray, chance: float) -> np.ndarray:
    """Return 1 − loss / room of the changed model, or the difference of two; NaN where there is no room but a loss."""
    original, *changed = accuracy
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [np.where(original > chance, 1.0 - (original - one) / (original - chance), np.nan) for one in changed]
    first, *second = [np.where(original == one, 1.0, share) for one, share in zip(changed, shares, strict=True)]
    return np.asarray(first - second[0]) if second else first


def _why_left_out(task: TaskAnswers, clearly: float) -> str:
    """Return why a task does not count above chance; empty if it does."""
    scores = np.asarray(task.original, dtype=float)
    sums, counts = _sums(scores[:, None], task.clusters).T
    if len(scores) < 2:
        return "which has one question"
    if len(counts) < 2:
        return "whose questions are all of one cluster"
    squares = float(((sums - scores.mean() * counts) ** 2).sum())
    error = math.sqrt(len(counts) / (len(counts) - 1) * squares) / len(scores)  # clustered: Miller, arXiv 2411.00640
    if scores.mean() - task.chance > clearly * error:
        return ""
    above = f"clearly above the chance of {task.chance:.1%}"
    return f"where the original's {scores.mean():.1%} ± {error:.1%} is not {above}"


def _by_group(tasks: Iterable[TaskAnswers]) -> dict[str, dict[str, TaskAnswers]]:
    """Return valid tasks by group and name."""
    groups: dict[str, dict[str, TaskAnswers]] = {}
    for task in tasks:
        sizes = len(task.original), len(task.changed), len(task.clusters)
        scores = np.array([*task.original, *task.changed, task.chance], dtype=float)
        same = sizes[0] == sizes[1] and sizes[2] in (0, sizes[0])
        if not sizes[0] or not same or not ((scores >= 0) & (scores <= 1)).all():
            raise StreamlineError(
                f"The task {task.name!r} has {sizes[0]} scores of the original, {sizes[1]} of the changed model, "
                f"{sizes[2]} clusters and the chance {task.chance}. Expected one score of each for at least one item, "
                "as many clusters or none, and scores and chance between 0 and 1. Score the same items with both."
            )
        if any(task.name in named for named in groups.values()):
            raise StreamlineError(f"Two tasks are named {task.name!r}. Expected distinct names. Rename one.")
        groups.setdefault(task.group, {})[task.name] = task
    if not groups:
        raise StreamlineError("There is no task to compare. Expected at least one. Pass one.")
    for group, named in groups.items():
        if not any(any(task.original) for task in named.values()):
            raise StreamlineError(
                f"In the group {group!r} the original scores 0 on every item, so nothing can be retained. Expected an "
                "item that it answers. Leave the group out."
            )
    return groups


def _require_same(*sides: Mapping[str, Mapping[str, TaskAnswers]]) -> None:
    """Raise if two models were evaluated on different tasks, or compared with different originals."""
    first, second = (
        {(group, name): task for group, named in side.items() for name, task in named.items()} for side in sides
    )
    if differing := sorted(name for _, name in first.keys() ^ second.keys()):
        raise StreamlineError(
            f"The task {differing[0]!r} is of one model only. Expected the same tasks of both. Evaluate both on it."
        )
    for key, task in first.items():
        one, other = ([list(t.original), list(t.clusters), t.chance] for t in (task, second[key]))
        if one != other:
            raise StreamlineError(
                f"The original's scores, chance or clusters of the task {task.name!r} differ between the two models. "
                "Expected one original, in one precision, on the same items in one order. Evaluate both again."
            )
