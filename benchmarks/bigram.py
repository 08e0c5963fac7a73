"""Baseline language model: a bigram with interpolated Kneser-Ney smoothing."""

from __future__ import annotations

import torch
from torch import Tensor


class Bigram:
    """Bigram model with interpolated Kneser-Ney smoothing and discounts estimated from the counts.

    ``p(w | v) = max(c(v, w) − D, 0)/c(v) + D·n(v)/c(v) · q(w)``, where n(v) is the number of distinct successors of v
    and q(w) is proportional to the number of distinct predecessors of w, discounted likewise and interpolated with the
    uniform distribution (Kneser and Ney 1995; D = n₁/(n₁ + 2n₂), Ney, Essen and Kneser 1994).

    Parameters
    ----------
    tokens : torch.Tensor
        The training text, of shape (tokens,).
    vocabulary : int
    """

    def __init__(self, tokens: Tensor, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.pairs, self.counts = (tokens[:-1] * vocabulary + tokens[1:]).unique(return_counts=True)
        before, after = self.pairs // vocabulary, self.pairs % vocabulary
        self.discount = discount(self.counts)
        self.times = torch.bincount(before, self.counts.double(), vocabulary)  # count as the first token of a pair
        self.successors = torch.bincount(before, minlength=vocabulary).double()
        predecessors = torch.bincount(after, minlength=vocabulary)
        less, kinds = discount(predecessors[predecessors > 0]), len(self.pairs)
        kept = less * int((predecessors > 0).sum()) / kinds
        self.lower = (predecessors.double() - less).clamp(min=0.0) / kinds + kept / vocabulary

    def probabilities(self, before: Tensor, after: Tensor) -> Tensor:
        """Return p(after | before), float64, in the shape of the arguments."""
        pairs = before * self.vocabulary + after
        place = torch.searchsorted(self.pairs, pairs).clamp(max=len(self.pairs) - 1)
        count = torch.where(self.pairs[place] == pairs, self.counts[place], 0).double()
        times = self.times[before]
        seen = times > 0
        times = times.clamp(min=1.0)
        own = (count - self.discount).clamp(min=0.0) / times
        backed_off = torch.where(seen, self.discount * self.successors[before] / times, 1.0)
        return own + backed_off * self.lower[after]

    def nll(self, sequences: Tensor) -> float:
        """Return the sum of −log p, in nats, over sequences of shape (sequences, tokens) without their first tokens."""
        return -float(self.probabilities(sequences[:, :-1], sequences[:, 1:]).log().sum())


def discount(counts: Tensor) -> float:
    """Return the discount n₁/(n₁ + 2n₂), where nₖ counts occur k times, or 0.5 if n₁ or n₂ is 0."""
    once, twice = (int((counts == k).sum()) for k in (1, 2))
    return once / (once + 2 * twice) if once and twice else 0.5
