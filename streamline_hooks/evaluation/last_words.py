"""Predicting how a text ends: its last word, as LAMBADA asks for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.continuations import score_continuations
from streamline_hooks.evaluation.perplexity import Perplexity
from streamline_hooks.evaluation.questions import Question
from streamline_hooks.evaluation.rows import read_rows

_LAYOUT = '{"context", "continuation"}'


@dataclass(frozen=True)
class LastWord:
    """A text and how it ends.

    Attributes
    ----------
    context, continuation : str
    where : str
        Where it comes from, for errors.
    """

    context: str
    continuation: str
    where: str = "a text"


@dataclass(frozen=True)
class LastWordScores:
    """What a model makes of several texts.

    Attributes
    ----------
    right : tuple of bool
        Whether every token of the end is the likeliest after those before it.
    loglikelihoods : tuple of float
        Of each end, in nats.
    """

    right: tuple[bool, ...]
    loglikelihoods: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Share of the ends that are predicted."""
        return sum(self.right) / len(self.right)

    @property
    def standard_error(self) -> float:
        """Of the accuracy: √(p(1 − p)/(n − 1)); NaN for one text."""
        p, n = self.accuracy, len(self.right)
        return math.sqrt(p * (1.0 - p) / (n - 1)) if n > 1 else math.nan

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of an end, all its tokens together."""
        return Perplexity(-math.fsum(self.loglikelihoods), len(self.loglikelihoods)).value

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%} of {len(self.right)} ends predicted"


def score_last_words(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[LastWord],
    *,
    batch_size: int = 16,
    add_bos: bool = False,
    what: str = "last words",
) -> LastWordScores:
    """Score how well the end of each text is predicted.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model.
    tokenizer : PreTrainedTokenizerBase
    texts : sequence of LastWord
        Context and end are joined as those of questions are, see `score_continuations`.
    batch_size : int
        Texts at a time.
    add_bos : bool
        Begin each text with the tokenizer's BOS token.
    what : str
        What the bar says.

    Returns
    -------
    LastWordScores

    Raises
    ------
    NotFiniteLikelihood
        If a likelihood is not finite.
    StreamlineError
        If there is no text, or one cannot be scored.
    """
    if not texts:
        raise StreamlineError("There is no text whose end could be predicted; give one at least.")
    asked = [Question((text.context,), (text.continuation,), 0, text.where) for text in texts]
    found = score_continuations(model, tokenizer, asked, batch_size=batch_size, add_bos=add_bos, what=what)
    return LastWordScores(tuple(one.greedy for (one,) in found), tuple(one.loglikelihood for (one,) in found))


def read_last_words(path: str | Path) -> list[LastWord]:
    """Read texts from a file of rows, see `read_rows`: each with a ``context`` and a ``continuation``.

    A row with a ``text`` alone is divided at its last space; white space of another kind before a word does not count.

    Raises
    ------
    StreamlineError
        If the file cannot be read, holds nothing, or a row is no such text; the text names the line.
    """
    rows = read_rows(path)
    if not rows:
        raise StreamlineError(f"{path} is empty; expected {_LAYOUT} on each line.")
    return [_last_word(row, row.where) for row in rows]


def _last_word(row: dict[str, Any], where: str) -> LastWord:
    context, continuation = row.get("context"), row.get("continuation")
    if context is None and isinstance(row.get("text"), str):
        context, _, continuation = row["text"].rstrip().rpartition(" ")
    if not (isinstance(context, str) and isinstance(continuation, str) and continuation.strip()):
        raise StreamlineError(f"{where} holds the keys {', '.join(row) or 'none'}; expected {_LAYOUT}, each a text.")
    return LastWord(context, continuation, where)
