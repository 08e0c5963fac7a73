"""Perplexity on text: of a model, and of what it would be with a window replaced."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.candidates import Candidate, candidate_outputs
from streamline_hooks.passes import inference, progress
from streamline_hooks.predicted import UNCOUNTED, following_tokens
from streamline_hooks.task import logits_of, task_of_classes

_TOKENS_AT_ONCE = 32  # few enough for the processor's cache, at any vocabulary

_LARGEST = math.log(sys.float_info.max)


class NotFiniteLikelihood(StreamlineError):
    """Raised if a log-likelihood is not finite."""


@dataclass(frozen=True)
class Perplexity:
    """A sum of negative log-likelihoods and the number of predicted tokens.

    Attributes
    ----------
    nll : float
        Sum of −log p(token | those before it in its sequence), in nats.
    tokens : int
        Predicted tokens; the first of a sequence is not predicted.
    """

    nll: float = 0.0
    tokens: int = 0

    @property
    def value(self) -> float:
        """Exp of the mean negative log-likelihood a token."""
        if not self.tokens:
            raise StreamlineError("No token was predicted; give sequences of at least two real tokens.")
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < _LARGEST else math.inf

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(self.nll + other.nll, self.tokens + other.tokens)


@checked()
def perplexity(model: nn.Module, batches: Sequence[Batch | Tensor], what: str = "perplexity") -> Perplexity:
    """Compute the perplexity of a causal language model.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        Token sequences; each token is predicted from those before it in its own sequence, and padding is left out.
    what : str
        Label of the progress bar.

    Returns
    -------
    Perplexity

    Raises
    ------
    StreamlineError
        If the model does not predict the text that it reads, as a classifier or an encoder-decoder.
    """
    require_text(model)
    total = Perplexity()
    ids = [input_ids(batch) for batch in batches]
    with inference(model), progress(sum(i.numel() for i in ids), what) as bar:
        for batch, tokens in zip(batches, ids, strict=True):
            given = prepare(model, batch)
            mask, positions = given.get("attention_mask"), given.get("position_ids")
            total += score(logits_of(model(**given)), given["input_ids"], mask, positions)
            bar.update(tokens.numel())
    return total


def perplexity_of_candidates(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[Candidate],
    what: str = "perplexity",
    *,
    stack: str | None = None,
) -> tuple[Perplexity, list[Perplexity]]:
    """Perplexity of a model and of each candidate; the blocks before a window are run once for all.

    Returns
    -------
    original : Perplexity
    candidates : list of Perplexity
    """
    total, each = Perplexity(), [Perplexity()] * len(candidates)
    require_text(model)
    with candidate_outputs(model, batches, candidates, what, stack) as outputs:
        for batch, output, others in outputs:
            ids, given = input_ids(batch), {} if isinstance(batch, Tensor) else batch
            told = ids, given.get("attention_mask"), given.get("position_ids")
            total += score(logits_of(output), *told)
            each = [sum_ + score(logits_of(other), *told) for sum_, other in zip(each, others, strict=True)]
    return total, each


def score(logits: Tensor, ids: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Perplexity:
    """Sum the negative log-likelihoods of the real tokens that have a real one of the same document before them.

    Logits have the shape (batch, tokens, vocabulary); ids, mask and positions (batch, tokens). A document begins where
    the positions begin again, see `following_tokens`.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    targets = following_tokens(ids, real, positions).to(logits.device)
    return Perplexity(sum(negative_log_likelihoods(logits, targets)), int((targets != UNCOUNTED).sum()))


def negative_log_likelihoods(logits: Tensor, targets: Tensor) -> list[float]:
    """Return the sum of −log p(target) of each row, in nats and float64.

    Parameters
    ----------
    logits : torch.Tensor
        Of shape (batch, tokens, vocabulary).
    targets : torch.Tensor
        Of shape (batch, tokens); `UNCOUNTED` where nothing is scored.
    """
    sums = []
    for row, wanted in zip(logits, targets, strict=True):
        total = 0.0
        for part, target in zip(row.split(_TOKENS_AT_ONCE), wanted.split(_TOKENS_AT_ONCE), strict=True):
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            losses = cross_entropy(wide, target, ignore_index=UNCOUNTED, reduction="none")
            total += float(losses.sum(dtype=torch.float64))
        sums.append(total)
    return sums


def input_ids(batch: Batch | Tensor) -> Tensor:
    """The token numbers of a batch, of shape (batch, tokens)."""
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    if ids is None or ids.is_floating_point():
        given = "a tensor of numbers" if isinstance(batch, Tensor) else ", ".join(batch)
        raise StreamlineError(f"A batch holds {given}, and no text (input_ids); only text has a likelihood.")
    return ids


def require_text(model: nn.Module) -> None:
    """Raise if a model does not predict the text that it reads."""
    known = task_of_classes([kind.__name__ for kind in type(model).__mro__])
    if known not in ("", "causal-lm", "seq2seq"):
        raise StreamlineError(
            f"{type(model).__name__} is for {known}: it does not predict the next token, so that text has no "
            "perplexity under it. Compare what it says (agreement, likeness)."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise StreamlineError(
            f"{type(model).__name__} reads one text and writes another, so that a text alone has no perplexity under "
            "it. Compare what it says by agreement, with decoder_input_ids in the batches."
        )
