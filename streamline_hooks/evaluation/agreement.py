"""How far what a changed model says is from what the original says, without labels."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.distance import kl_by_token
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import inference, progress
from streamline_hooks.scoped import scoped
from streamline_hooks.task import Task

_TOKENS_AT_ONCE = 32  # few enough for the processor's cache, at any vocabulary


_LEAST, _MOST, _A_DECADE = -8, 3, 100  # powers of ten; bins between two of them, so 2.3 % apart
_BINS = (_MOST - _LEAST) * _A_DECADE + 2  # with what is below and what is above


@dataclass(frozen=True)
class NatsHistogram:
    """Distribution of a quantity over tokens: counts in bins of equal ratio from 1e-8 to 1e3 nats.

    Attributes
    ----------
    counts : tuple of int
        Empty, or one a bin, of which the first holds everything below, zero too, and the last everything above.

    Examples
    --------
    >>> spread = NatsHistogram.of(torch.tensor([0.1, 0.2, 0.3, 4.0]))
    >>> round((spread + spread).quantile(0.5), 2)
    0.2
    """

    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, nats: Tensor) -> NatsHistogram:
        """Count one number per token, of any shape."""
        bins = ((nats.double().clamp_min(1e-300).log10() - _LEAST) * _A_DECADE).floor() + 1
        counted = torch.bincount(bins.clamp(0, _BINS - 1).long().flatten(), minlength=_BINS)
        return cls(tuple(counted.tolist()))

    def quantile(self, share: float) -> float:
        """Return what a share of the tokens does not exceed, within 1.2 %."""
        reached = list(accumulate(self.counts))
        if not self.counts or not reached[-1]:
            raise StreamlineError("No token was counted, so that there is no quantile of them.")
        number = bisect_left(reached, max(1, math.ceil(share * reached[-1])))
        if number == 0:
            return 0.0
        return float(10.0 ** (_LEAST + (min(number, _BINS - 2) - 0.5) / _A_DECADE))

    def __add__(self, other: NatsHistogram) -> NatsHistogram:
        if not self.counts or not other.counts:
            return self if self.counts else other
        return NatsHistogram(tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))


@dataclass(frozen=True)
class Agreement:
    """How alike two models' distributions are; sums, so that parts of a text can be added.

    Attributes
    ----------
    nats : float
        Sum over tokens of KL(original ‖ changed).
    same : int
        Tokens for which both put the same next token first; of equal ones the lower number is first.
    tokens : int
        Real tokens, the last of a sequence among them: what follows it needs no label. Of a classifier, what it was
        shown.
    spread : NatsHistogram
        KL by token.
    unit : str
        What there is a distribution for: a token, an image, a text.

    Examples
    --------
    >>> print(Agreement(nats=3.0, same=8, tokens=12) + Agreement(nats=1.0, same=1, tokens=4))
    KL 0.250 nats a token, the same token first for 56.2% of 16 tokens
    """

    nats: float = 0.0
    same: int = 0
    tokens: int = 0
    spread: NatsHistogram = field(default_factory=NatsHistogram)
    unit: str = "token"

    @property
    def kl(self) -> float:
        """Mean KL(original ‖ changed) a token, in nats."""
        return self.nats / self._tokens()

    @property
    def top1(self) -> float:
        """Share of tokens for which both put the same next token first."""
        return self.same / self._tokens()

    def _tokens(self) -> int:
        if not self.tokens:
            raise StreamlineError("No token was compared; give sequences with a real token.")
        return self.tokens

    def __add__(self, other: Agreement) -> Agreement:
        unit = self.unit if self.tokens else other.unit
        return Agreement(
            self.nats + other.nats, self.same + other.same, self.tokens + other.tokens, self.spread + other.spread, unit
        )

    def __str__(self) -> str:
        first = "token" if self.unit == "token" else "class"
        article = "an" if self.unit == "image" else "a"
        return (
            f"KL {self.kl:.3f} nats {article} {self.unit}, the same {first} first for {self.top1:.1%} of "
            f"{self.tokens:,} {self.unit}s"
        )


@checked()
def agreement(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Batch | Tensor],
    what: str = "agreement",
    *,
    task: Task | None = None,
) -> Agreement:
    """KL and top-1 agreement of a changed model with its original, without labels.

    Both models are run on each batch before the next, so that memory holds the logits of one batch, twice.

    Parameters
    ----------
    model : torch.nn.Module
        The changed model.
    original : torch.nn.Module
        Another module in memory, of the same vocabulary or classes; it may be on another device, or in another
        precision.
    batches : sequence of mapping or torch.Tensor
        Token sequences, of which padding is left out; or images, or whatever the model takes.
    what : str
        What the bar says.
    task : Task, optional
        What the model is for, see `Task.of`. Embeddings are no distributions; `likeness` compares them.

    Returns
    -------
    Agreement

    Raises
    ------
    StreamlineError
        If both are one module, their logits differ in shape or are not finite, or no token is real.

    Examples
    --------
    >>> import copy, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from streamline_hooks import LayerSurgeon
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    ... )
    >>> original, tokens = copy.deepcopy(model), torch.arange(12).view(2, 6)
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove(range(1, 3))
    ...     changed = agreement(model, original, [tokens])
    >>> changed.kl > 0 and changed.tokens == 12
    True
    >>> print(agreement(model, original, [tokens]))
    KL 0.000 nats a token, the same token first for 100.0% of 12 tokens
    """
    task = task or Task.of(original)
    if not task.gives_distributions:
        raise StreamlineError(f"{type(original).__name__} makes embeddings, which have no KL; call likeness.")
    total = Agreement(unit=task.unit)
    with paired_answers(model, original, batches, what, task) as pairs:
        for _, _, reference, answers in pairs:
            total += agreement_of(reference, answers, total.unit)
    total._tokens()  # nothing to compare is an error here, not where the result is read
    return total


@scoped
def paired_answers(
    model: nn.Module, original: nn.Module, batches: Sequence[Batch | Tensor], what: str, task: Task
) -> Generator[tuple[dict[str, Any], Any, Tensor, Tensor], None, None]:
    """Run two models on each batch; a context manager.

    Yields
    ------
    given : dict
        Inputs of the changed model, see `prepare`.
    output : Any
        Output of the changed model.
    reference, answers : torch.Tensor
        Answers of the original and of the changed model, see `Task.answers`: of shape (answers, features), on one
        device.
    """
    require_two(model, original)
    with (
        inference(model),
        inference(original),
        progress(sum(tokens_of(batch) for batch in batches), what) as bar,
    ):
        for number, batch in enumerate(batches):
            reference = task.answers(original(**prepare(original, batch)), batch)
            given = prepare(model, batch)
            output = model(**given)
            answers = task.answers(output, batch).to(reference.device)
            require_one_vocabulary(reference, answers)
            require_finite({"original": reference, "changed model": answers}, number)
            yield given, output, reference, answers
            bar.update(tokens_of(batch))


def agreement_of(reference: Tensor, answers: Tensor, unit: str = "token") -> Agreement:
    """Compute the agreement of two models by their logits, of shape (tokens, vocabulary)."""
    same, each = 0, []
    for p, q in zip(reference.split(_TOKENS_AT_ONCE), answers.split(_TOKENS_AT_ONCE), strict=True):
        each.append(kl_by_token(p.float().log_softmax(dim=-1), q))
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    nats = torch.cat(each).double() if each else torch.zeros(0, dtype=torch.float64)
    return Agreement(float(nats.sum()), same, len(reference), NatsHistogram.of(nats), unit)


def stability(
    loglikelihoods: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], same: Sequence[bool]
) -> float:
    """Compute the stability of a changed model on multiple choice (LLM-Streamline, arXiv 2403.19135).

    An item weighs by how sure the original is of it: the standard deviation over its choices of the mean negative
    log-likelihood a token, put through a softmax over the items. The script published beside the paper differs: it adds
    up the first weights of the list, and takes the mean over the tokens of context and choice.

    Parameters
    ----------
    loglikelihoods : sequence of sequence of float
        Of the original, by item and choice, in nats.
    tokens : sequence of sequence of int
        Scored tokens, by item and choice.
    same : sequence of bool
        For each item, whether both models answer it right, or both wrong.

    Returns
    -------
    float
        The weight of the items with `same`, 0 to 1.

    Examples
    --------
    >>> round(stability([[-1.0, -3.0], [-2.0, -2.0]], [[1, 1], [1, 1]], [True, False]), 4)  # e/(e + 1)
    0.7311
    """
    deviations = np.array([np.std(np.divide(nats, count)) for nats, count in zip(loglikelihoods, tokens, strict=True)])
    weights = np.exp(deviations - deviations.max())
    return float(weights[np.asarray(same, dtype=bool)].sum() / weights.sum())


def require_two(model: nn.Module, original: nn.Module) -> None:
    """Raise if a changed model is its own original, which agrees with itself whatever was done to it."""
    if model is original:
        raise StreamlineError(
            "The changed model and its original are one module, which agrees with itself whatever was done to it. Keep "
            "a copy of the original (copy.deepcopy) before changing it, or load it again."
        )


def require_one_vocabulary(reference: Tensor, answers: Tensor) -> None:
    """Raise if the original's answers and the changed model's differ in shape."""
    if answers.shape != reference.shape:
        raise StreamlineError(
            f"The changed model's answers have the shape {tuple(answers.shape)}, the original's "
            f"{tuple(reference.shape)} (..., vocabulary, classes or features). Compare models of one vocabulary."
        )


def require_finite(answers_by_model: dict[str, Tensor], number: int) -> None:
    """Raise if a model's answers are not finite; the text names the model and the batch."""
    for name, answers in answers_by_model.items():
        if not math.isfinite(answers.sum(dtype=torch.float64)) and not answers.isfinite().all():
            raise StreamlineError(
                f"The {name}'s logits hold NaN or infinite values (batch {number}); nothing can be judged by them. "
                "Look at its weights, or run in a wider precision (float32 or bfloat16)."
            )
