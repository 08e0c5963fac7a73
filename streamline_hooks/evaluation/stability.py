"""Whether a changed model is right where its original is right, and wrong where it is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.choices import ChoiceScores

Spread = Literal["nats", "perplexity"]


@dataclass(frozen=True)
class Stability:
    """How far two models are right and wrong about the same questions.

    Attributes
    ----------
    same : tuple of bool
        For each question, whether both models answer it right, or both wrong.
    weights : tuple of float
        What each question counts; their sum is 1.

    Examples
    --------
    >>> print(Stability(same=(True, True, False), weights=(0.5, 0.25, 0.25)))
    stability 75.0%, 66.7% with equal weights; the weights are those of 2.7 of 3 questions
    """

    same: tuple[bool, ...]
    weights: tuple[float, ...]

    @property
    def value(self) -> float:
        """The weight of the questions about which the two are alike, 0 to 1."""
        return math.fsum(weight for weight, alike in zip(self.weights, self.same, strict=True) if alike)

    @property
    def share(self) -> float:
        """The share of such questions, each with the same weight."""
        return sum(self.same) / len(self.same)

    @property
    def effective(self) -> float:
        """How many questions of equal weight would be as sure: 1/Σw². Near 1, a single question decides."""
        return 1.0 / math.fsum(weight * weight for weight in self.weights)

    def __str__(self) -> str:
        return (
            f"stability {self.value:.1%}, {self.share:.1%} with equal weights; the weights are those of "
            f"{self.effective:.1f} of {len(self.same)} questions"
        )


def stability(
    changed: ChoiceScores, original: ChoiceScores, *, spread: Spread = "nats", normalised: bool = False
) -> Stability:
    """Stability of a changed model, by LLM-Streamline (arXiv 2403.19135).

    A question counts by how sure the original is of it: the standard deviation (of the population) over its choices of
    how unlikely the original finds them, put through a softmax over the questions. Stability is the weight of those
    which both models answer right or both answer wrong. Accuracy alone does not see that a model loses some answers
    and wins others by luck.

    What is published beside the paper differs in three ways. Its script (``calculate_stability.py``) counts the alike
    questions, and adds up as many weights from the beginning of the list, whichever questions they belong to; here each
    question brings its own. What it calls PPL is, in the evaluation that it reads (OpenCompass), the mean negative
    log-likelihood a token, not the exponential of it; so does ``spread="nats"``, while ``spread="perplexity"`` takes
    the word for what it says, and often leaves one question with all the weight, see `Stability.effective`. And there
    the mean is over the tokens of context and choice together; here over those of the choice, so that the deviations,
    and with them the differences of weight, are larger.

    Parameters
    ----------
    changed, original : ChoiceScores
        Of the same questions, in the same order.
    spread : {"nats", "perplexity"}
        What the standard deviation is of: the mean negative log-likelihood a token, or its exponential.
    normalised : bool
        What is right: by likelihood a character.

    Returns
    -------
    Stability

    Raises
    ------
    StreamlineError
        If the two are not of the same questions.

    Examples
    --------
    Of the first question the original is surer (1 and 3 nats a token, deviation 1) than of the second (deviation 0).

    >>> original = ChoiceScores(((-1.0, -3.0), (-2.0, -2.0)), ((4, 4), (4, 4)), (0, 0), ((1, 1), (1, 1)))
    >>> changed = ChoiceScores(((-1.0, -2.0), (-3.0, -1.0)), ((4, 4), (4, 4)), (0, 0), ((1, 1), (1, 1)))
    >>> round(stability(changed, original).value, 4)  # e/(e + 1)
    0.7311
    """
    if spread not in ("nats", "perplexity"):
        raise StreamlineError(f"spread={spread!r} is neither 'nats' nor 'perplexity'.")
    _require_same_questions(changed, original)
    pairs = zip(original.loglikelihoods, original.tokens, strict=True)
    each = [-np.asarray(found) / np.asarray(tokens) for found, tokens in pairs]
    logs = np.array([_log_deviation(nats, spread == "perplexity") for nats in each])
    right = [(s.right_normalised if normalised else s.right) for s in (changed, original)]
    same = tuple(a == b for a, b in zip(*right, strict=True))
    return Stability(same, tuple(_softmax_of_exp(logs).tolist()))


def _log_deviation(nats: np.ndarray, exponentiate: bool) -> float:
    """The logarithm of the standard deviation of some values, or of their exponentials, which may be huge."""
    top = float(nats.max()) if exponentiate else 0.0
    deviation = float(np.exp(nats - top).std() if exponentiate else nats.std())
    return top + math.log(deviation) if deviation else -math.inf


def _softmax_of_exp(logs: np.ndarray) -> np.ndarray:
    """Softmax of values that are given by their logarithms, and that may be too large to write down."""
    top = logs.max()
    if top == -math.inf:
        return np.full(len(logs), 1.0 / len(logs))
    below = -np.expm1(logs - top)  # how far below the largest, as a part of it
    weights = np.exp(-np.exp(min(top, 700.0)) * below)
    return np.asarray(weights / weights.sum())


def _require_same_questions(changed: ChoiceScores, original: ChoiceScores) -> None:
    if len(changed.gold) != len(original.gold):
        raise StreamlineError(
            f"The changed model answered {len(changed.gold)} questions, the original {len(original.gold)}. Score the "
            "same questions with both."
        )
    for number, pair in enumerate(zip(_questions(changed), _questions(original), strict=True)):
        if pair[0] != pair[1]:
            raise StreamlineError(
                f"Question {number} (counted from 0) has the right answer and lengths {pair[0]} for the changed model "
                f"and {pair[1]} for the original. Score the same questions with both, in the same order."
            )


def _questions(scores: ChoiceScores) -> list[tuple[int, tuple[int, ...]]]:
    return list(zip(scores.gold, scores.lengths, strict=True))
