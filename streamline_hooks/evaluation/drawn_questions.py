"""How far another draw of the questions would have moved a number: a bootstrap, the same questions for all models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_AT_ONCE = 1 << 22  # numbers drawn at a time


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


def accuracies(name: str, answers: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Accuracy of each model, of the questions as they are and then of each draw.

    Questions with the same answers of all models are one kind; how many of each kind a draw holds is multinomial.

    Parameters
    ----------
    name : str
        Of the task; the draws depend on it and the seed alone.
    answers : numpy.ndarray
        Of shape (questions, models), from 0 to 1.
    draws, seed : int

    Returns
    -------
    numpy.ndarray
        Of shape (models, 1 + draws).

    Examples
    --------
    >>> found = accuracies("task", np.array([[1.0, 1.0], [1.0, 0.0]]), draws=4, seed=0)
    >>> found.shape, found[:, 0].tolist(), found[0].tolist()
    ((2, 5), [1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0])
    """
    kinds, counts = np.unique(answers, axis=0, return_counts=True)
    total = int(counts.sum())
    random = np.random.default_rng([seed, *name.encode()])
    found = [(counts[None] * kinds.T[:, None]).sum(axis=2) / total]
    for start in range(0, draws, step := max(1, _AT_ONCE // len(kinds))):
        drawn = random.multinomial(total, counts / total, size=min(step, draws - start))
        found.append(np.stack([(drawn * kind).sum(axis=1) for kind in kinds.T]) / total)
    return np.concatenate(found, axis=1)


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
