"""Score the prediction of the last word of a text, as in LAMBADA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamline_hooks.core import StreamlineError, max_positions, prepare_inputs, progress_bar
from streamline_hooks.evaluation import NotFiniteLikelihood, Perplexity
from streamline_hooks.modeling import get_logits, inference, logits_to_keep


@dataclass(frozen=True)
class LastWord:
    """A context and its continuation.

    Attributes
    ----------
    context, continuation : str
        The two parts of the text, joined by a space unless there is white space between them.
    where : str
        Source of the text, for error messages.
    """

    context: str
    continuation: str
    where: str = "a text"

    @property
    def text(self) -> str:
        """The complete text."""
        apart = self.context and not self.context[-1].isspace() and not self.continuation[0].isspace()
        return self.context + (" " if apart else "") + self.continuation


@dataclass(frozen=True)
class LastWordScores:
    """Scores of several texts.

    Attributes
    ----------
    right : tuple of bool
        Whether all tokens of the continuation are the most likely ones.
    loglikelihoods : tuple of float
        Log-likelihood of each continuation, in nats.
    """

    right: tuple[bool, ...]
    loglikelihoods: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Fraction of the texts with a correctly predicted continuation."""
        return sum(self.right) / len(self.right)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood per continuation."""
        return Perplexity(-math.fsum(self.loglikelihoods), len(self.loglikelihoods)).value


def score_last_words(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[LastWord],
    *,
    batch_size: int = 16,
) -> LastWordScores:
    """Score the continuation of each text.

    Each text is tokenized as a whole. The first scored token is the first that differs from the tokens of the context.
    """
    rows = [_tokens(model, tokenizer, text) for text in texts]
    order = sorted(range(len(rows)), key=lambda k: -len(rows[k][0]))
    scores = [(0.0, False)] * len(rows)
    with inference(model), progress_bar(len(rows), "last words", "texts") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for k, (nats, greedy) in zip(batch, _scores(model, [rows[k] for k in batch]), strict=True):
                if not math.isfinite(nats):
                    raise NotFiniteLikelihood(
                        f"The log-likelihood of {texts[k].where} is {nats}. Expected a finite number. Look at the "
                        "model's weights, or run in a wider precision (float32 or bfloat16)."
                    )
                scores[k] = nats, greedy
            bar.update(len(batch))
    return LastWordScores(tuple(greedy for _, greedy in scores), tuple(nats for nats, _ in scores))


def _tokens(model: nn.Module, tokenizer: Any, text: LastWord) -> tuple[list[int], int]:
    """Return the tokens of a text and the index of the first scored token."""

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else []

    tokens, context = ids(text.text), ids(text.context)
    pairs = zip(tokens, context, strict=False)
    start = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(context)))
    if start == len(tokens):
        raise StreamlineError(
            f"In {text.where} the continuation has no token. Expected at least one. Leave the text out."
        )
    if not start:
        raise StreamlineError(f"{text.where} has no token before its continuation. Expected a context. Add one.")
    positions = max_positions(getattr(model, "config", None))
    if positions is not None and len(tokens) > positions:
        raise StreamlineError(
            f"{text.where} has {len(tokens)} tokens. Expected no more than the model's {positions} positions. Shorten "
            "it."
        )
    return tokens, start


def _scores(model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each continuation and whether it is greedy; padding is on the right."""
    width, first = max(len(tokens) for tokens, _ in rows), min(start for _, start in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, (tokens, _) in enumerate(rows):
        ids[k, : len(tokens)] = torch.tensor(tokens)
        mask[k, : len(tokens)] = 1
    inputs = prepare_inputs(model, {"input_ids": ids, "attention_mask": mask})
    logits = get_logits(model(**inputs, **logits_to_keep(model, width - first)))[:, first - width :]
    scores = []
    for row, (tokens, start) in zip(logits, rows, strict=True):
        chosen = row[start - 1 - first : len(tokens) - 1 - first]
        logs = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(dim=-1)
        targets = torch.tensor(tokens[start:], device=logs.device)
        nats = logs.gather(1, targets[:, None]).flatten()
        scores.append((math.fsum(nats.tolist()), bool((logs.argmax(dim=-1) == targets).all())))
    return scores
