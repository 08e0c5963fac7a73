"""How far another draw of the questions would have moved a number: a bootstrap, the same questions for all models."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS_AT_ONCE = 1 << 22  # numbers drawn at a time


@dataclass(frozen=True)
class Estimate:
    """A number, and how far another draw of the questions would have moved it.

    Attributes
    ----------
    value : float
    low, high : float
        Percentile interval; −∞ and ∞ where the draws leave it open.
    standard_error : float
        Standard deviation of the draws.
    undefined : float
        The share of draws in which there was nothing to retain: the original no better than chance, and the changed
        model different. They lie outside the interval, on both sides.
    """

    value: float
    low: float
    high: float
    standard_error: float
    undefined: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def accuracies(name: str, answers: np.ndarray, draws: int, seed: int, clusters: Sequence[Hashable] = ()) -> np.ndarray:
    """Accuracy of each model, of the questions as they are and then of each draw.

    Questions with the same answers of all models are one kind; how many of each kind a draw holds is multinomial.

    Parameters
    ----------
    name : str
        Of the task; the draws depend on it and the seed alone.
    answers : numpy.ndarray
        Of shape (questions, models), from 0 to 1.
    draws, seed : int
    clusters : sequence of hashable, optional
        One a question: those of one cluster are drawn together, as one.

    Returns
    -------
    numpy.ndarray
        Of shape (models, 1 + draws).

    Examples
    --------
    >>> found = accuracies("task", np.array([[1.0, 1.0], [1.0, 0.0]]), draws=4, seed=0)
    >>> found.shape, found[:, 0].tolist(), found[0].tolist()
    ((2, 5), [1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0])
    >>> accuracies("task", np.array([[1.0], [0.0]]), draws=4, seed=0, clusters=["one", "one"]).tolist()
    [[0.5, 0.5, 0.5, 0.5, 0.5]]
    """
    kinds, counts = np.unique(_summed(answers, clusters), axis=0, return_counts=True)
    total = int(counts.sum())
    random = np.random.default_rng([seed, *name.encode()])
    found = [_shares(counts[None], kinds)]
    for start in range(0, draws, step := max(1, DRAWS_AT_ONCE // len(kinds))):
        found.append(_shares(random.multinomial(total, counts / total, size=min(step, draws - start)), kinds))
    return np.concatenate(found, axis=1)


def standard_error(answers: np.ndarray, clusters: Sequence[Hashable] = ()) -> float:
    """Of one model's accuracy, questions of one cluster standing or falling together; infinite where there is one.

    The root of C/(C - 1) times the sum of squares, over C clusters, of what each adds to or takes from the mean
    (Miller, Adding Error Bars to Evals, arXiv 2411.00640, with the correction for few clusters); of questions that
    stand alone the usual one.

    Examples
    --------
    >>> right = np.array([1.0, 1.0, 0.0, 0.0])
    >>> round(standard_error(right), 4), standard_error(right, "aabb"), standard_error(right, "aaaa")
    (0.2887, 0.5, inf)
    """
    *sums, counts = _summed(answers[:, None], clusters).T
    if len(counts) < 2:
        return math.inf
    apart = sums[0] - answers.mean() * counts
    return math.sqrt(len(counts) / (len(counts) - 1) * float((apart**2).sum())) / len(answers)


def _summed(answers: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Of each cluster what its questions sum to for each model, and in the last column how many there are."""
    if not len(clusters):
        return np.concatenate([answers, np.ones((len(answers), 1))], axis=1)
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    found = np.zeros((len(places), answers.shape[1] + 1))
    np.add.at(found, [places[cluster] for cluster in clusters], _summed(answers, ()))
    return found


def _shares(drawn: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    *sums, counts = kinds.T
    questions = (drawn * counts).sum(axis=1)
    return np.stack([(drawn * kind).sum(axis=1) / questions for kind in sums])


def share_kept(before: np.ndarray, after: np.ndarray, chance: float) -> np.ndarray:
    """1 − loss/room: 1 where nothing is lost, whatever the room, and NaN where there is no room but a difference."""
    loss, room = before - after, before - chance
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.where(room > 0, 1.0 - loss / room, np.nan)
    return np.where(loss == 0, 1.0, kept)


def estimate(values: np.ndarray, level: float) -> Estimate:
    """Of a value and its draws, some of them NaN, with a percentile interval that holds so much of them."""
    drawn = values[1:]
    open_ = np.isnan(drawn)
    last = len(drawn) - 1
    cut = int(last * (1.0 - level) / 2.0)
    low = np.sort(np.where(open_, -np.inf, drawn))[cut]
    high = np.sort(np.where(open_, np.inf, drawn))[last - cut]
    defined = drawn[~open_]
    error = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return Estimate(float(values[0]), float(low), float(high), error, float(open_.mean()))
