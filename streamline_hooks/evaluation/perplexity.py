"""Perplexity on batches of text, of a model and of candidates with a replaced window."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamline_hooks.core import (
    IGNORE_INDEX,
    Batch,
    StreamlineError,
    rows_at_once,
    shift_labels,
    target_ids,
    validate_arguments,
    widest_float,
)
from streamline_hooks.evaluation.agreement import warn_that_prompts_are_run_in_full
from streamline_hooks.modeling import (
    Candidate,
    StateSource,
    VariantOutputs,
    get_logits,
    refuse_later_tokens,
    task_from_class_names,
)
from streamline_hooks.surgery import as_state_source

_MAX_LOG = math.log(sys.float_info.max)


class NotFiniteLikelihood(StreamlineError):
    """Error for a log-likelihood that is not finite."""


@dataclass(frozen=True)
class Perplexity:
    """Sum of negative log-likelihoods and number of predicted tokens; instances can be added.

    Attributes
    ----------
    nll : float
        Sum of −log p(token | earlier tokens of the sequence), in nats.
    tokens : int
        Number of predicted tokens. The first token of a sequence is not predicted.

    Examples
    --------
    >>> round((Perplexity(nll=6.0, tokens=4) + Perplexity(nll=2.0, tokens=4)).value, 3)
    2.718
    """

    nll: float = 0.0
    tokens: int = 0

    @property
    def value(self) -> float:
        """The perplexity: exp(nll / tokens)."""
        if not self.tokens:
            raise StreamlineError(
                "No token was predicted. Expected sequences with at least two real tokens. Pass longer text."
            )
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < _MAX_LOG else math.inf

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@validate_arguments()
def perplexity(
    model: nn.Module | StateSource, batches: Sequence[Batch | Tensor], desc: str = "perplexity"
) -> Perplexity:
    """Compute the perplexity of a causal language model on batches of token sequences.

    For documents longer than a batch row use `sliding_perplexity`.

    Parameters
    ----------
    model : torch.nn.Module or StateSource
        A causal language model.
    batches : sequence of mapping or torch.Tensor
        Token ids of shape (batch, tokens), or mappings with ``input_ids``. Each token is predicted from the earlier
        tokens of its sequence. Padding and tokens with label -100, such as image tokens, are ignored.
    desc : str
        Label of the progress bar.

    Returns
    -------
    Perplexity

    Raises
    ------
    StreamlineError
        If the model is not a causal language model.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> perplexity(tiny_model("llama"), [torch.arange(12).view(2, 6)]).tokens
    10
    """
    return perplexity_of_candidates(model, batches, [], desc)[0]


def perplexity_of_candidates(
    model: nn.Module | StateSource,
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[Candidate],
    desc: str = "perplexity",
    *,
    stack: str | None = None,
) -> tuple[Perplexity, list[Perplexity]]:
    """Compute the perplexity of a model and of each candidate; blocks before a window run once per batch."""
    source = as_state_source(model, stack)
    require_causal_lm(source.model)
    total, results = Perplexity(), [Perplexity()] * len(candidates)
    warn_that_prompts_are_run_in_full(source.model)
    with source.outputs(batches, candidates, desc) as outputs:
        for at in outputs:
            total += _score_output(at, at.output)
            results = [result + _score_output(at, run()) for result, run in zip(results, at.variants, strict=True)]
    return total, results


def _score_output(at: VariantOutputs, output: Any) -> Perplexity:
    logits = get_logits(output)
    if at.labels is not None:
        return _score_labels(logits, at.labels.to(logits.device))
    fields = {} if isinstance(at.inputs, Tensor) else at.inputs
    return score_tokens(logits, target_ids(at.inputs), fields.get("attention_mask"), fields.get("position_ids"))


def score_tokens(logits: Tensor, ids: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Perplexity:
    """Sum the negative log-likelihoods of the real tokens that follow a real token of the same document.

    Parameters
    ----------
    logits : torch.Tensor
        Logits of shape (batch, tokens, vocabulary).
    ids : torch.Tensor
        Token ids of shape (batch, tokens).
    mask : torch.Tensor or None
        Attention mask of shape (batch, tokens); None without padding.
    positions : torch.Tensor, optional
        Position ids of shape (batch, tokens). A document begins where the positions restart (see `shift_labels`).

    Returns
    -------
    Perplexity

    Examples
    --------
    >>> round(score_tokens(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]), None).value)
    8
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    return _score_labels(logits, shift_labels(ids, real, positions).to(logits.device))


def _score_labels(logits: Tensor, labels: Tensor) -> Perplexity:
    return Perplexity(sum(negative_log_likelihoods(logits, labels)), int((labels != IGNORE_INDEX).sum()))


def negative_log_likelihoods(logits: Tensor, targets: Tensor) -> list[float]:
    """Return the sum of −log p(target) of each row, in nats, accumulated in float64 where the device has it.

    Logits have the shape (batch, tokens, vocabulary), targets (batch, tokens). `IGNORE_INDEX` is not scored.
    """
    sums: list[Tensor] = []
    wide, tokens = widest_float(logits.device), rows_at_once(logits.shape[-1], logits.device)
    for row, row_targets in zip(logits, targets, strict=True):
        total = torch.zeros((), dtype=wide, device=logits.device)
        for part, target in zip(row.split(tokens), row_targets.split(tokens), strict=True):
            upcast = part.to(torch.promote_types(part.dtype, torch.float32))
            losses = cross_entropy(upcast, target, ignore_index=IGNORE_INDEX, reduction="none")
            total += losses.sum(dtype=wide)
        sums.append(total)
    return torch.stack(sums).tolist() if sums else []


def require_causal_lm(model: nn.Module) -> None:
    """Raise StreamlineError if a model is not a causal language model."""
    known = task_from_class_names([kind.__name__ for kind in type(model).__mro__])
    if known not in ("", "causal-lm", "seq2seq"):
        raise StreamlineError(
            f"{type(model).__name__} is a model for {known}: it does not predict the next token, so its perplexity is "
            "undefined. Compare its outputs with agreement or embedding_similarity."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise StreamlineError(
            f"{type(model).__name__} is an encoder-decoder model, so the perplexity of a text alone is undefined. "
            "Compare its outputs with agreement, with decoder_input_ids in the batches."
        )
    refuse_later_tokens(model, "Perplexity")
