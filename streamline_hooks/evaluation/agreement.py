"""How far a changed model is from the original, on text without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.batch import real_tokens as mask_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.candidates import Candidate, candidate_logits, real_tokens
from streamline_hooks.evaluation.nats_histogram import NatsHistogram
from streamline_hooks.hidden_state import token_mask
from streamline_hooks.passes import inference, logits_of, progress

_TOKENS_AT_ONCE = 32  # few enough for the processor's cache, at any vocabulary


@dataclass(frozen=True)
class Agreement:
    """How alike two models' next-token distributions are; sums, so that parts of a text can be added.

    Attributes
    ----------
    nats : float
        Sum over tokens of KL(original ‖ changed).
    same : int
        Tokens for which both put the same next token first; of equal ones the lower number is first.
    tokens : int
        Real tokens, the last of a sequence among them: what follows it needs no label.
    spread : NatsHistogram
        KL by token.

    Examples
    --------
    >>> print(Agreement(nats=3.0, same=8, tokens=12) + Agreement(nats=1.0, same=1, tokens=4))
    KL 0.250 nats a token, the same token first for 56.2% of 16 tokens
    """

    nats: float = 0.0
    same: int = 0
    tokens: int = 0
    spread: NatsHistogram = field(default_factory=NatsHistogram)

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
        return Agreement(
            self.nats + other.nats, self.same + other.same, self.tokens + other.tokens, self.spread + other.spread
        )

    def __str__(self) -> str:
        return f"KL {self.kl:.3f} nats a token, the same token first for {self.top1:.1%} of {self.tokens:,} tokens"


def agreement(
    model: nn.Module, original: nn.Module, batches: Sequence[Batch | Tensor], what: str = "agreement"
) -> Agreement:
    """KL and top-1 agreement of a changed model with its original, on text without labels.

    Both models are run on each batch before the next, so that memory holds the logits of one batch, twice.

    Parameters
    ----------
    model : torch.nn.Module
        The changed model.
    original : torch.nn.Module
        Another module in memory, of the same vocabulary; it may be on another device, or in another precision.
    batches : sequence of mapping or torch.Tensor
        Token sequences; padding is left out.
    what : str
        What the bar says.

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
    total = Agreement()
    for _, mask, reference, logits in paired_logits(model, original, batches, what):
        total += agreement_of(reference, logits, mask)
    total._tokens()  # nothing to compare is an error here, not where the result is read
    return total


def paired_logits(
    model: nn.Module, original: nn.Module, batches: Sequence[Batch | Tensor], what: str
) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
    """Run two models on each batch.

    Yields
    ------
    given : dict
        What the changed model was called with, see `prepare`.
    mask : torch.Tensor
        The real tokens, of shape (batch, tokens).
    reference : torch.Tensor
        The original's logits of shape (batch, tokens, vocabulary).
    logits : torch.Tensor
        The changed model's, on the same device.
    """
    require_two(model, original)
    with (
        inference(model),
        inference(original),
        progress(sum(tokens_of(batch) for batch in batches), what) as bar,
    ):
        for number, batch in enumerate(batches):
            reference = logits_of(original(**prepare(original, batch)))
            given = prepare(model, batch)
            logits = logits_of(model(**given)).to(reference.device)
            require_one_vocabulary(reference, logits)
            mask = token_mask(reference, mask_of(given))
            require_finite({"original": reference, "changed model": logits}, mask, number)
            yield given, mask, reference, logits
            bar.update(int(mask.sum()))


def agreement_of(reference: Tensor, logits: Tensor, mask: Tensor) -> Agreement:
    """Agreement of two models' logits.

    Parameters
    ----------
    reference, logits : torch.Tensor
        The original's and the changed model's, of shape (batch, tokens, vocabulary).
    mask : torch.Tensor
        The real tokens, of shape (batch, tokens).
    """
    reference, logits = real_tokens(reference, mask), real_tokens(logits, mask)
    same, each = 0, []
    for p, q in zip(reference.split(_TOKENS_AT_ONCE), logits.split(_TOKENS_AT_ONCE), strict=True):
        each.append(_kl_by_token(p.float().log_softmax(dim=-1), q))
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    nats = torch.cat(each).double()
    return Agreement(float(nats.sum()), same, len(reference), NatsHistogram.of(nats))


def kl_of_candidates(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[Candidate],
    *,
    stack: str | None = None,
) -> list[float]:
    """KL of each candidate's next-token distribution from the original's.

    Parameters
    ----------
    model : torch.nn.Module
        The original.
    batches : sequence of mapping or torch.Tensor
        Text that no candidate was fitted on.
    candidates : sequence of Candidate
    stack : str, optional
        Path of the stack, see `find_stack`.

    Returns
    -------
    list of float
        Mean KL(original ‖ candidate) a token, in nats.
    """
    sums, tokens = [0.0] * len(candidates), 0
    what = f"judge: {len(candidates)} windows"
    for _, mask, original, each in candidate_logits(model, batches, candidates, what, stack):
        reference = real_tokens(original, mask).float().log_softmax(dim=-1)  # once for all candidates
        tokens += len(reference)
        for k, logits in enumerate(each):
            sums[k] += summed_kl(reference, real_tokens(logits, mask))
    return [total / tokens for total in sums]


def kl_divergence(original: Tensor, other: Tensor) -> float:
    """Sum over tokens of KL(original ‖ other) between distributions given by logits.

    Parameters
    ----------
    original, other : torch.Tensor
        Logits of shape (tokens, vocabulary).

    Returns
    -------
    float
        In nats.

    Examples
    --------
    >>> import torch
    >>> logits = torch.randn(5, 7)
    >>> kl_divergence(logits, logits + 3.0) < 1e-5
    True
    """
    return summed_kl(original.float().log_softmax(dim=-1), other)


def summed_kl(reference: Tensor, other: Tensor) -> float:
    """The sum of KL over tokens, of distributions given by log-probabilities and by logits."""
    total = torch.zeros((), dtype=torch.float64, device=reference.device)
    for p, q in zip(reference.split(_TOKENS_AT_ONCE), other.split(_TOKENS_AT_ONCE), strict=True):
        total += _kl_by_token(p, q).sum(dtype=torch.float64)
    return float(total)


def _kl_by_token(reference: Tensor, other: Tensor) -> Tensor:
    """KL of each token, of distributions given by log-probabilities and by logits."""
    difference = reference - other.float().log_softmax(dim=-1)
    return difference.mul_(reference.exp()).sum(dim=-1)


def require_two(model: nn.Module, original: nn.Module) -> None:
    """Raise if a changed model is its own original, which agrees with itself whatever was done to it."""
    if model is original:
        raise StreamlineError(
            "The changed model and its original are one module, which agrees with itself whatever was done to it. Keep "
            "a copy of the original (copy.deepcopy) before changing it, or load it again."
        )


def require_one_vocabulary(reference: Tensor, logits: Tensor) -> None:
    """Raise if the original's logits and the changed model's differ in shape."""
    if logits.shape != reference.shape:
        raise StreamlineError(
            f"The changed model's logits have the shape {tuple(logits.shape)}, the original's "
            f"{tuple(reference.shape)} (batch, tokens, vocabulary). Compare models of one vocabulary."
        )


def require_finite(logits_by_model: dict[str, Tensor], mask: Tensor, number: int) -> None:
    """Raise if a model's logits at real tokens are not finite; the text names the model and the batch."""
    for name, logits in logits_by_model.items():
        if not math.isfinite(logits.sum(dtype=torch.float64)) and not real_tokens(logits, mask).isfinite().all():
            raise StreamlineError(
                f"The {name}'s logits hold NaN or infinite values (batch {number}); nothing can be judged by them. "
                "Look at its weights, or run in a wider precision (float32 or bfloat16)."
            )
