"""How far a changed model is from the original, on text without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.evaluation.candidates import Candidate, candidate_logits, real_tokens

_TOKENS_AT_ONCE = 32  # few enough for the processor's cache, at any vocabulary


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
        difference = p - q.float().log_softmax(dim=-1)
        total += difference.mul_(p.exp()).sum(dim=-1).sum(dtype=torch.float64)
    return float(total)
