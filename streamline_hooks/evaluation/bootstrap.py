"""Relative accuracy with bootstrap intervals, and paired comparisons of two models."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamline_hooks.core import StreamlineError, validate_arguments

DRAWS_AT_ONCE = 1 << 22  # maximum number of multinomial counts per chunk


@dataclass(frozen=True)
class PairedScores:
    """Scores of two models on the same items of a task.

    Attributes
    ----------
    name : str
        Name of the task.
    original, changed : sequence of bool or float
        Scores of both models by item, 0 to 1.
    chance : float
        Accuracy of guessing.
    group : str
        Group of the task, such as classification or generation. Groups are reported separately.
    clusters : sequence of hashable
        Cluster of each item, such as its passage. Clusters are resampled as a whole. Empty for independent items.

    Examples
    --------
    >>> len(PairedScores("arc", [True, False], [True, True], chance=0.25).changed)
    2
    """

    name: str
    original: Sequence[bool] | Sequence[float]
    changed: Sequence[bool] | Sequence[float]
    chance: float = 0.0
    group: str = "classification"
    clusters: Sequence[Hashable] = ()


@dataclass(frozen=True)
class Estimate:
    """Statistic with its bootstrap interval.

    Attributes
    ----------
    value : float
        The statistic.
    low, high : float
        Limits of the percentile interval; −∞ and ∞ if too many draws are undefined.
    standard_error : float
        Standard deviation of the defined draws.
    undefined : float
        Fraction of the draws in which the original is no better than chance. They count as outside the interval.

    Examples
    --------
    >>> print(Estimate(0.91, 0.87, 0.95, standard_error=0.02))
    91.0% [87.0%, 95.0%]
    """

    value: float
    low: float
    high: float
    standard_error: float
    undefined: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class RelativeAccuracyDifference:
    """Relative accuracy of one changed model minus that of another, in one group of tasks; see `paired_bootstrap`.

    Attributes
    ----------
    ratio, above_chance, tasks, left_out
        See `RelativeAccuracy`.

    Examples
    --------
    >>> RelativeAccuracyDifference(Estimate(0.02, -0.01, 0.05, 0.015), None, {}, {}).ratio.value
    0.02
    """

    ratio: Estimate
    above_chance: Estimate | None
    tasks: Mapping[str, Estimate]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class RelativeAccuracy(RelativeAccuracyDifference):
    """Relative accuracy of a changed model in one group of tasks; returned by `relative_accuracy`.

    Attributes
    ----------
    ratio : Estimate
        Mean accuracy over the tasks, divided by that of the original.
    above_chance : Estimate or None
        Mean over `tasks` of (accuracy − chance) / (original accuracy − chance); None if `tasks` is empty.
    tasks : dict of str to Estimate
        (accuracy − chance) / (original accuracy − chance) of each task on which the original is clearly above chance.
    left_out : dict of str to str
        The other tasks, with the reason.

    Examples
    --------
    >>> print(RelativeAccuracy(Estimate(0.9, 0.85, 0.95, 0.02), None, {}, {"arc": "which has one question"}))
    90.0% [85.0%, 95.0%] of the mean accuracy, no task above chance (0 of 1 tasks; without arc, which has one question)
    """

    def __str__(self) -> str:
        count = f"{len(self.tasks)} of {len(self.tasks) + len(self.left_out)} tasks"
        without = "".join(f"; without {name}, {reason}" for name, reason in self.left_out.items())
        above = f"{self.above_chance} above chance" if self.above_chance else "no task above chance"
        return f"{self.ratio} of the mean accuracy, {above} ({count}{without})"


@validate_arguments(clearly=0, draws=100, level="(0, 1)", seed=0)
def relative_accuracy(
    tasks: Iterable[PairedScores], *, clearly: float = 3.0, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, RelativeAccuracy]:
    """Compute the relative accuracy of a changed model by group of tasks, with bootstrap intervals.

    LLM-Streamline (arXiv 2403.19135) and most papers on pruning report `RelativeAccuracy.ratio`, which rewards
    guessing; `RelativeAccuracy.above_chance` does not. The scores of both models are resampled together, so that items
    that are hard for both models do not enlarge the interval. The draws of a task depend only on its name and the seed.

    Parameters
    ----------
    tasks : iterable of PairedScores
        The scores of both models, by task.
    clearly : float
        Number of standard errors by which the original must exceed chance for a task to count in
        `RelativeAccuracy.above_chance`.
    draws : int
        Number of bootstrap draws, at least 100.
    level : float
        Coverage of the intervals, between 0 and 1.
    seed : int
        Seed of the draws.

    Returns
    -------
    dict of str to RelativeAccuracy
        By group.

    Raises
    ------
    StreamlineError
        If a setting or task is invalid, two tasks have the same name, or the original scores 0 on a whole group.

    Examples
    --------
    >>> original, changed = [True] * 80 + [False] * 20, [True] * 70 + [False] * 30
    >>> result = relative_accuracy([PairedScores("arc", original, changed, chance=0.25)])["classification"]
    >>> round(result.ratio.value, 4), round(result.above_chance.value, 4)  # 0.7/0.8 and 0.45/0.55
    (0.875, 0.8182)
    """
    settings = (clearly, draws, level, seed)
    return {group: RelativeAccuracy(*_statistics(named, None, *settings)) for group, named in _by_group(tasks).items()}


@validate_arguments(clearly=0, draws=100, level="(0, 1)", seed=0)
def paired_bootstrap(
    first: Iterable[PairedScores],
    second: Iterable[PairedScores],
    *,
    clearly: float = 3.0,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, RelativeAccuracyDifference]:
    """Compute the difference in relative accuracy of two changed models by a paired bootstrap.

    The scores of both models and the original are resampled together, so the interval may exclude 0 even if the
    intervals of the two models overlap.

    Parameters
    ----------
    first, second : iterable of PairedScores
        The scores of the two models, on the same tasks and with the same original.
    clearly, draws, level, seed
        See `relative_accuracy`.

    Returns
    -------
    dict of str to RelativeAccuracyDifference
        By group: relative accuracy of the first model minus that of the second.

    Raises
    ------
    StreamlineError
        As `relative_accuracy`, or if the tasks or originals differ.

    Examples
    --------
    >>> original, worse = [True] * 90 + [False] * 10, [True] * 60 + [False] * 40
    >>> better = [True] * 66 + [False] * 34
    >>> first, second = (PairedScores("arc", original, changed, chance=0.25) for changed in (better, worse))
    >>> difference = paired_bootstrap([first], [second])["classification"].above_chance
    >>> round(difference.value, 4), difference.low > 0  # 0.41/0.65 and 0.35/0.65
    (0.0923, True)
    """
    settings = (clearly, draws, level, seed)
    groups, other = _by_group(first), _by_group(second)
    _require_same(groups, other)
    return {
        group: RelativeAccuracyDifference(*_statistics(tasks, other[group], *settings))
        for group, tasks in groups.items()
    }


def _statistics(
    named: Mapping[str, PairedScores], other: Mapping[str, PairedScores] | None, clearly: float, draws: int,
    level: float, seed: int,
) -> tuple[Estimate, Estimate | None, dict[str, Estimate], dict[str, str]]:  # fmt: skip
    """Return the fields of `RelativeAccuracy`, or, with a second model, of `RelativeAccuracyDifference`."""
    drawn = {}
    for name, task in sorted(named.items()):  # fixed order of summation
        scores = [task.original, task.changed, *([] if other is None else [other[name].changed])]
        drawn[name] = bootstrap_accuracies(name, np.asarray(scores, dtype=float).T, draws, seed, task.clusters)
    left_out = {name: reason for name, task in named.items() if (reason := _exclusion_reason(task, clearly))}
    shares = {name: _relative(rows, named[name].chance) for name, rows in drawn.items() if name not in left_out}
    return (
        _estimate(_relative(np.mean(list(drawn.values()), axis=0), 0.0), level),
        _estimate(np.mean(list(shares.values()), axis=0), level) if shares else None,
        {name: _estimate(shares[name], level) for name in named if name in shares},
        left_out,
    )


def _estimate(values: np.ndarray, level: float) -> Estimate:
    """Return the estimate for a value followed by its draws, which may be NaN."""
    value, drawn = float(values[0]), values[1:]
    undefined = np.isnan(drawn)
    defined, last = drawn[~undefined], len(drawn) - 1
    cut = int(last * (1.0 - level) / 2.0)
    low = np.sort(np.where(undefined, -np.inf, drawn))[cut]
    high = np.sort(np.where(undefined, np.inf, drawn))[last - cut]
    error = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return Estimate(value, float(low), float(high), error, float(undefined.mean()))


def bootstrap_accuracies(
    name: str, scores: np.ndarray, draws: int, seed: int, clusters: Sequence[Hashable] = ()
) -> np.ndarray:
    """Return accuracies on the items and on each bootstrap draw, of shape (models, 1 + draws).

    `scores` has the shape (items, models). Items or clusters with equal scores are drawn together, with multinomial
    counts.
    """
    kinds, counts = np.unique(_cluster_sums(scores, clusters), axis=0, return_counts=True)
    total = int(counts.sum())
    random = np.random.default_rng([seed, *name.encode()])

    def means(drawn: np.ndarray) -> np.ndarray:
        *sums, items = kinds.T
        return np.stack([(drawn * kind).sum(axis=1) / (drawn * items).sum(axis=1) for kind in sums])

    accuracies = [means(counts[None])]
    for start in range(0, draws, step := max(1, DRAWS_AT_ONCE // len(kinds))):
        accuracies.append(means(random.multinomial(total, counts / total, size=min(step, draws - start))))
    return np.concatenate(accuracies, axis=1)


def _cluster_sums(scores: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Return, by cluster, the sum of scores of each model, and the number of items in the last column."""
    counted = np.column_stack([scores, np.ones(len(scores))])
    if not len(clusters):
        return counted
    number = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(number), counted.shape[1]))
    np.add.at(sums, [number[cluster] for cluster in clusters], counted)
    return sums


def _relative(accuracy: np.ndarray, chance: float) -> np.ndarray:
    """Return (accuracy − chance) / (original − chance), or the difference of two models.

    The value is 1 where both accuracies are equal, else NaN where the original is not above chance.
    """
    original, *changed = accuracy
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [np.where(original > chance, 1.0 - (original - new) / (original - chance), np.nan) for new in changed]
    first, *second = [np.where(original == new, 1.0, share) for new, share in zip(changed, shares, strict=True)]
    return np.asarray(first - second[0]) if second else first


def _exclusion_reason(task: PairedScores, clearly: float) -> str:
    """Return the reason why a task does not count above chance, or an empty string if it does."""
    scores = np.asarray(task.original, dtype=float)
    sums, counts = _cluster_sums(scores[:, None], task.clusters).T
    if len(scores) < 2:
        return "which has one question"
    if len(counts) < 2:
        return "whose questions all belong to one cluster"
    squares = float(((sums - scores.mean() * counts) ** 2).sum())
    error = math.sqrt(len(counts) / (len(counts) - 1) * squares) / len(scores)  # clustered: Miller, arXiv 2411.00640
    if scores.mean() - task.chance > clearly * error:
        return ""
    score = f"{scores.mean():.1%} ± {error:.1%}"
    return f"where the original's {score} is not clearly above the chance of {task.chance:.1%}"


def _by_group(tasks: Iterable[PairedScores]) -> dict[str, dict[str, PairedScores]]:
    """Validate tasks, and return them by group and name."""
    groups: dict[str, dict[str, PairedScores]] = {}
    for task in tasks:
        sizes = len(task.original), len(task.changed), len(task.clusters)
        scores = np.array([*task.original, *task.changed, task.chance], dtype=float)
        same = sizes[0] == sizes[1] and sizes[2] in (0, sizes[0])
        if not sizes[0] or not same or not ((scores >= 0) & (scores <= 1)).all():
            raise StreamlineError(
                f"The task {task.name!r} has {sizes[0]} scores of the original, {sizes[1]} of the changed model, "
                f"{sizes[2]} clusters and chance={task.chance}. Expected one score per item of both models, at least "
                "one item, one cluster per item or none, and scores and chance between 0 and 1. Score the same items "
                "with both models."
            )
        if any(task.name in named for named in groups.values()):
            raise StreamlineError(f"Two tasks are named {task.name!r}. Expected distinct names. Rename one.")
        groups.setdefault(task.group, {})[task.name] = task
    if not groups:
        raise StreamlineError("There is no task to compare. Expected at least one. Pass a list of PairedScores.")
    for group, named in groups.items():
        if not any(any(task.original) for task in named.values()):
            raise StreamlineError(
                f"The original scores 0 on every item of the group {group!r}, so relative accuracy is undefined. "
                "Expected at least one item with a score above 0. Leave the group out."
            )
    return groups


def _require_same(*sides: Mapping[str, Mapping[str, PairedScores]]) -> None:
    """Raise StreamlineError if the tasks or the originals of two models differ."""
    first, second = (
        {(g, name): [list(t.original), list(t.clusters), t.chance] for g in side for name, t in side[g].items()}
        for side in sides
    )
    for _, name in sorted(first.keys() ^ second.keys()):
        raise StreamlineError(
            f"The task {name!r} was evaluated for one model only. Expected the same tasks for both. Evaluate both on "
            "it."
        )
    for _, name in (key for key in first if first[key] != second[key]):
        raise StreamlineError(
            f"The original's scores, chance or clusters on the task {name!r} differ between the two models. Expected "
            "one original, in the same precision, on the same items in the same order. Evaluate both again."
        )
