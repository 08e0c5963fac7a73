"""Compare the logits of a changed model with the original's: KL divergence, top-1 agreement, stability."""

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

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    count_tokens,
    get_logger,
    prepare_inputs,
    progress_bar,
    rows_at_once,
    to_float64,
    validate_arguments,
)
from streamline_hooks.modeling import Task, closing_generator, inference, kl_by_token
from streamline_hooks.surgery import find_prompt_skip, split_large_batches

logger = get_logger(__name__)
_MIN_EXPONENT, _MAX_EXPONENT, _BINS_PER_DECADE = -8, 3, 100  # neighboring bin edges differ by 2.3 %
_BINS = (_MAX_EXPONENT - _MIN_EXPONENT) * _BINS_PER_DECADE + 2  # plus one bin below and one above the range


@dataclass(frozen=True)
class KLHistogram:
    """Histogram of the KL divergence over tokens, with logarithmic bins from 1e-8 to 1e3 nats.

    The first bin counts smaller values, the last bin larger values.

    Examples
    --------
    >>> histogram = KLHistogram.of(torch.tensor([0.1, 0.2, 0.3, 4.0]))
    >>> round((histogram + histogram).quantile(0.5), 2)
    0.2
    """

    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, nats: Tensor) -> KLHistogram:
        """Create a histogram of a tensor of any shape."""
        bins = ((nats.double().clamp_min(1e-300).log10() - _MIN_EXPONENT) * _BINS_PER_DECADE).floor() + 1
        return cls(tuple(torch.bincount(bins.clamp(0, _BINS - 1).long().flatten(), minlength=_BINS).tolist()))

    def quantile(self, share: float) -> float:
        """Return the quantile at `share` (0 to 1), with a relative error of at most 1.2 %."""
        cumulative = list(accumulate(self.counts))
        if not any(cumulative):
            raise StreamlineError("The histogram is empty, so it has no quantile. Expected at least one token.")
        number = bisect_left(cumulative, max(1, math.ceil(share * cumulative[-1])))
        return float(10.0 ** (_MIN_EXPONENT + (min(number, _BINS - 2) - 0.5) / _BINS_PER_DECADE)) if number else 0.0

    def __add__(self, other: KLHistogram) -> KLHistogram:
        if not self.counts or not other.counts:
            return self if self.counts else other
        return KLHistogram(tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))


@dataclass(frozen=True)
class Agreement:
    """Agreement of the output distributions of two models; instances can be added.

    Attributes
    ----------
    nats : float
        Sum over tokens of KL(original ‖ changed), in nats.
    same : int
        Number of tokens with the same top-1 prediction. Ties go to the lowest index.
    tokens : int
        Number of real tokens, including the last token of each sequence; or of images or texts.
    spread : KLHistogram
        Distribution of the KL divergence over tokens.
    unit : str
        The unit that has one output distribution: "token", "image" or "text".

    Examples
    --------
    >>> print(Agreement(nats=3.0, same=8, tokens=12) + Agreement(nats=1.0, same=1, tokens=4))
    KL 0.250 nats per token, same top-1 token for 56.2% of 16 tokens
    """

    nats: float = 0.0
    same: int = 0
    tokens: int = 0
    spread: KLHistogram = field(default_factory=KLHistogram)
    unit: str = "token"

    @property
    def kl(self) -> float:
        """Mean KL(original ‖ changed), in nats per token."""
        return self.nats / self._tokens()

    @property
    def top1(self) -> float:
        """Fraction of tokens with the same top-1 prediction."""
        return self.same / self._tokens()

    def _tokens(self) -> int:
        if not self.tokens:
            raise StreamlineError(
                "No token was compared. Expected sequences with at least one real token. Pass longer text."
            )
        return self.tokens

    def __add__(self, other: Agreement) -> Agreement:
        sums = self.nats + other.nats, self.same + other.same, self.tokens + other.tokens, self.spread + other.spread
        return Agreement(*sums, unit=self.unit if self.tokens else other.unit)

    def __str__(self) -> str:
        prediction = "token" if self.unit == "token" else "class"
        return (
            f"KL {self.kl:.3f} nats per {self.unit}, same top-1 {prediction} for {self.top1:.1%} of {self.tokens:,} "
            f"{self.unit}s"
        )


@validate_arguments()
def agreement(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Batch | Tensor],
    desc: str = "agreement",
    *,
    task: Task | None = None,
) -> Agreement:
    """Compute the KL divergence and top-1 agreement of a changed model with its original.

    No labels are needed. For embedding models use `embedding_similarity`.

    Parameters
    ----------
    model : torch.nn.Module
        The changed model.
    original : torch.nn.Module
        The original model, with the same vocabulary or classes. It must be a different module; its device and dtype may
        differ.
    batches : sequence of mapping or torch.Tensor
        Inputs of the models. Padding is ignored.
    desc : str
        Label of the progress bar.
    task : Task, optional
        The models' task (see `Task.of`).

    Returns
    -------
    Agreement

    Raises
    ------
    StreamlineError
        If both arguments are the same module, the models return embeddings, their logits differ in shape or are not
        finite, or no token is real.

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
    KL 0.000 nats per token, same top-1 token for 100.0% of 12 tokens
    """
    task = task or Task.of(original)
    if not task.gives_distributions:
        raise StreamlineError(
            f"{type(original).__name__} returns embeddings, which have no KL divergence. Expected a model with logits. "
            "Call embedding_similarity."
        )
    total = Agreement(unit=task.unit)
    with run_paired(model, original, split_large_batches(original, batches), desc, task) as pairs:
        for _, _, reference, answers in pairs:
            total += compare_logits(reference, answers, total.unit)
    total._tokens()  # raises if no token was compared
    return total


def warn_that_prompts_are_run_in_full(*models: nn.Module) -> None:
    """Warn that all tokens of a text run all blocks, if the prompts of a model skip some of them."""
    if any(find_prompt_skip(model) is not None for model in models):
        logger.warning("The prompts of a model skip blocks, but this measurement runs all of them for every token")


@closing_generator
def run_paired(
    model: nn.Module, original: nn.Module, batches: Sequence[Batch | Tensor], desc: str, task: Task
) -> Generator[tuple[dict[str, Any], Any, Tensor, Tensor], None, None]:
    """Run both models batch by batch, and yield inputs, output, and the `Task.answers` of original and changed model.

    Memory holds the logits of one batch, for both models.
    """
    require_distinct_models(model, original)
    warn_that_prompts_are_run_in_full(model, original)
    with inference(model), inference(original), progress_bar(sum(map(count_tokens, batches)), desc) as bar:
        for number, batch in enumerate(batches):
            reference = task.answers(original(**prepare_inputs(original, batch)), batch)
            inputs = prepare_inputs(model, batch)
            output = model(**inputs)
            answers = task.answers(output, batch).to(reference.device)
            require_same_shape(reference, answers)
            require_finite_outputs({"original": reference, "changed model": answers}, number)
            yield inputs, output, reference, answers
            bar.update(count_tokens(batch))


def compare_logits(reference: Tensor, answers: Tensor, unit: str = "token") -> Agreement:
    """Compute the agreement of two models from their logits.

    Parameters
    ----------
    reference, answers : torch.Tensor
        Logits of the original and of the changed model, of shape (tokens, vocabulary).
    unit : str
        Unit of a row: "token", "image" or "text".

    Returns
    -------
    Agreement

    Examples
    --------
    >>> compare_logits(torch.zeros(3, 8), torch.zeros(3, 8)).kl
    0.0
    """
    same, kl_parts = torch.zeros((), dtype=torch.long, device=reference.device), []
    rows = rows_at_once(reference.shape[-1], reference.device)
    for p, q in zip(reference.split(rows), answers.split(rows), strict=True):
        kl_parts.append(kl_by_token(p.float().log_softmax(dim=-1), q))
        same += (p.argmax(dim=-1) == q.argmax(dim=-1)).sum()
    nats = to_float64(torch.cat(kl_parts)) if kl_parts else torch.zeros(0, dtype=torch.float64)
    return Agreement(float(nats.sum()), int(same), len(reference), KLHistogram.of(nats), unit)


def stability(
    loglikelihoods: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], same: Sequence[bool]
) -> float:
    """Compute the stability of a changed model on multiple choice (LLM-Streamline, arXiv 2403.19135).

    Stability is the total weight of the items on which both models are right or both are wrong. The weights are a
    softmax, over items, of the standard deviation, over choices, of the original's mean log-likelihood per token. The
    script published with the paper differs: it sums the first weights of the list, and takes the mean over the tokens
    of context and choice.

    Parameters
    ----------
    loglikelihoods : sequence of sequence of float
        Log-likelihoods of the original in nats, by item and choice.
    tokens : sequence of sequence of int
        Number of scored tokens, by item and choice.
    same : sequence of bool
        By item, whether both models are right or both are wrong.

    Returns
    -------
    float
        The stability, 0 to 1.

    Examples
    --------
    >>> round(stability([[-1.0, -3.0], [-2.0, -2.0]], [[1, 1], [1, 1]], [True, False]), 4)  # e/(e + 1)
    0.7311
    """
    deviations = np.array([np.std(np.divide(nats, count)) for nats, count in zip(loglikelihoods, tokens, strict=True)])
    weights = np.exp(deviations - deviations.max())
    return float(weights[np.asarray(same, dtype=bool)].sum() / weights.sum())


def require_distinct_models(model: nn.Module, original: nn.Module) -> None:
    """Raise StreamlineError if both arguments are the same module."""
    if model is original:
        raise StreamlineError(
            "The changed model and its original are the same module, which always agrees with itself. Expected two "
            "modules. Keep a copy of the original (copy.deepcopy) before changing it, or load it again."
        )


def require_same_shape(reference: Tensor, answers: Tensor) -> None:
    """Raise StreamlineError if the outputs of both models differ in shape."""
    if answers.shape != reference.shape:
        raise StreamlineError(
            f"The outputs of the changed model have shape {tuple(answers.shape)}, those of the original "
            f"{tuple(reference.shape)}. Expected the same shape (..., vocabulary, classes or features). Compare models "
            "with the same vocabulary."
        )


def require_finite_outputs(answers_by_model: dict[str, Tensor], number: int) -> None:
    """Raise StreamlineError, with the name of the model and the number of the batch, if outputs are not finite."""
    for name, answers in answers_by_model.items():
        if not math.isfinite(answers.sum(dtype=torch.float64)) and not answers.isfinite().all():
            raise StreamlineError(
                f"The {name}'s logits contain NaN or infinite values (batch {number}). Expected finite values. Check "
                "its weights, or run in float32 or bfloat16."
            )
