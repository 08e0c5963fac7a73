"""Multiple choice: which of several texts a model finds likeliest, and how often that is the right one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.continuations import score_continuations
from streamline_hooks.evaluation.questions import Question


@dataclass(frozen=True)
class ChoiceScores:
    """Log-likelihoods of the choices, and how often the likeliest is the right one; the earlier one wins a tie.

    Attributes
    ----------
    loglikelihoods : tuple of tuple of float
        For each question, one a choice, in nats.
    lengths : tuple of tuple of int
        The characters of each continuation.
    gold : tuple of int
    tokens : tuple of tuple of int
        The scored tokens of each continuation.
    """

    loglikelihoods: tuple[tuple[float, ...], ...]
    lengths: tuple[tuple[int, ...], ...]
    gold: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]

    @property
    def right(self) -> tuple[bool, ...]:
        """For each question, whether the likeliest choice is the right one."""
        return tuple(_argmax(found) == gold for found, gold in zip(self.loglikelihoods, self.gold, strict=True))

    @property
    def right_normalised(self) -> tuple[bool, ...]:
        """The same by log-likelihood a character, which does not favour short choices."""
        each = zip(self.loglikelihoods, self.lengths, self.gold, strict=True)
        return tuple(_argmax([a / n for a, n in zip(f, ns, strict=True)]) == gold for f, ns, gold in each)

    @property
    def accuracy(self) -> float:
        """Share of questions answered right."""
        return sum(self.right) / len(self.gold)

    @property
    def normalised_accuracy(self) -> float:
        """Share of questions answered right by log-likelihood a character."""
        return sum(self.right_normalised) / len(self.gold)

    @property
    def standard_error(self) -> float:
        """Of the accuracy: √(p(1 − p)/(n − 1)); NaN for one question."""
        return _standard_error(self.accuracy, len(self.gold))

    @property
    def normalised_standard_error(self) -> float:
        """Of the normalised accuracy."""
        return _standard_error(self.normalised_accuracy, len(self.gold))

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.1%} ± {self.standard_error:.1%} of {len(self.gold)} questions answered right, "
            f"{self.normalised_accuracy:.1%} ± {self.normalised_standard_error:.1%} by likelihood a character"
        )


def score_choices(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    add_bos: bool = False,
    what: str = "questions",
) -> ChoiceScores:
    """Score each choice by the log-likelihood of its text after its context, see `score_continuations`.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    tokenizer : PreTrainedTokenizerBase
    questions : sequence of Question
    batch_size : int
        Choices at a time; a question with more of them is not divided.
    add_bos : bool
        Begin each text with the tokenizer's BOS token.
    what : str
        What the bar says.

    Returns
    -------
    ChoiceScores
        In the order of the questions.

    Raises
    ------
    NotFiniteLikelihood
        If a likelihood is not finite.
    StreamlineError
        If a question cannot be scored; the text says where it comes from.
    """
    if not questions:
        raise StreamlineError("There is no question to score; give one at least.")
    found = score_continuations(model, tokenizer, questions, batch_size=batch_size, add_bos=add_bos, what=what)
    return ChoiceScores(
        tuple(tuple(one.loglikelihood for one in each) for each in found),
        tuple(tuple(map(len, question.continuations)) for question in questions),
        tuple(question.gold for question in questions),
        tuple(tuple(one.tokens for one in each) for each in found),
    )


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _standard_error(share: float, count: int) -> float:
    return math.sqrt(share * (1.0 - share) / (count - 1)) if count > 1 else math.nan
