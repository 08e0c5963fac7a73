"""Predict how a text ends: its last word, as LAMBADA asks for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamline_hooks.batch import positions_of, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.perplexity import NotFiniteLikelihood, Perplexity
from streamline_hooks.passes import head_on_last, inference, progress
from streamline_hooks.task import logits_of


@dataclass(frozen=True)
class LastWord:
    """A text and how it ends.

    Attributes
    ----------
    context, continuation : str
        Joined by a space unless one of the two has white space there.
    where : str
        Where it comes from, for error messages.
    """

    context: str
    continuation: str
    where: str = "a text"

    @property
    def text(self) -> str:
        """The whole text."""
        apart = self.context and not self.context[-1].isspace() and not self.continuation[0].isspace()
        return self.context + (" " if apart else "") + self.continuation


@dataclass(frozen=True)
class LastWordScores:
    """Scores of several texts.

    Attributes
    ----------
    right : tuple of bool
        Whether each token of the end is the most likely one after those before it.
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
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of an end, all its tokens together."""
        return Perplexity(-math.fsum(self.loglikelihoods), len(self.loglikelihoods)).value


def score_last_words(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[LastWord],
    *,
    batch_size: int = 16,
) -> LastWordScores:
    """Score how well the end of each text is predicted.

    A text is tokenised as a whole. The first scored token is the first one that differs from the context's own tokens.
    """
    rows = [_tokens(model, tokenizer, text) for text in texts]
    order = sorted(range(len(rows)), key=lambda k: -len(rows[k][0]))
    found = [(0.0, False)] * len(rows)
    with inference(model), progress(len(rows), "last words", "texts") as bar:
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            for k, (nats, greedy) in zip(batch, _scores(model, [rows[k] for k in batch]), strict=True):
                if not math.isfinite(nats):
                    raise NotFiniteLikelihood(
                        f"The log-likelihood of {texts[k].where} is {nats}. Expected a finite number. Look at the "
                        "model's weights, or run in a wider precision (float32 or bfloat16)."
                    )
                found[k] = nats, greedy
            bar.update(len(batch))
    return LastWordScores(tuple(greedy for _, greedy in found), tuple(nats for nats, _ in found))


def _tokens(model: nn.Module, tokenizer: Any, text: LastWord) -> tuple[list[int], int]:
    """Return the tokens of a text, and the number of the first that is scored."""

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else []

    tokens, context = ids(text.text), ids(text.context)
    pairs = zip(tokens, context, strict=False)
    start = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(context)))
    if start == len(tokens):
        raise StreamlineError(f"In {text.where} the end has no token. Expected one after the context. Leave it out.")
    if not start:
        raise StreamlineError(f"{text.where} has no token before its end. Expected a context. Give one.")
    positions = positions_of(getattr(model, "config", None))
    if positions is not None and len(tokens) > positions:
        raise StreamlineError(
            f"{text.where} has {len(tokens)} tokens. Expected no more than the model's {positions} positions. Shorten "
            "it."
        )
    return tokens, start


def _scores(model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each end and whether it is greedy; padded right, which no causal token sees."""
    width, first = max(len(tokens) for tokens, _ in rows), min(start for _, start in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, (tokens, _) in enumerate(rows):
        ids[k, : len(tokens)] = torch.tensor(tokens)
        mask[k, : len(tokens)] = 1
    given = prepare(model, {"input_ids": ids, "attention_mask": mask})
    logits = logits_of(model(**given, **head_on_last(model, width - first)))[:, first - width :]
    found = []
    for row, (tokens, start) in zip(logits, rows, strict=True):
        chosen = row[start - 1 - first : len(tokens) - 1 - first]
        logs = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(dim=-1)
        targets = torch.tensor(tokens[start:], device=logs.device)
        nats = logs.gather(1, targets[:, None]).flatten()
        found.append((math.fsum(nats.tolist()), bool((logs.argmax(dim=-1) == targets).all())))
    return found
