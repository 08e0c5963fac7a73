"""How much the states of a sequence tell apart, at each place of the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from streamline_hooks.statistics.bootstrap import ResampledSums

_BUCKETS = 20


class StateEntropy:
    """Entropy of the hidden states at each place, whose increase across a window speaks for keeping it.

    EntroDrop (arXiv 2504.03794) takes the states of some tokens as samples and compares three estimators, of which
    buckets and nearest neighbours serve about equally well. This is the bucket estimator: each feature's range, from
    its least to its greatest value, is divided into 20 buckets of equal width, and the entropy −Σ p ln p of the
    shares p of the tokens is averaged over the features. The tokens are those of one sequence, and the result is the
    mean over the sequences, weighted by their tokens, so that nothing has to be kept of a sequence.

    Parameters
    ----------
    places : int
        L + 1.
    replicates : int
        Number of resamples, see `ResampledSums`.

    Notes
    -----
    In nats a feature, from 0 to ln 20; EntroDrop's own code sums over the features, which orders windows alike. A
    sequence of n tokens cannot have more than ln n, so compare profiles of like sequences only. A feature of one value
    has entropy 0, and so would a sequence of one token: these are left out. One massive token stretches the range of
    every feature, so that entropy falls in the block where massive activations are born; skip the tokens that have
    them (usually the first one) to see past it.

    Examples
    --------
    >>> entropy = StateEntropy(1)
    >>> entropy.update([[torch.tensor([[0.0, 5.0], [1.0, 5.0]])]])
    >>> round(entropy.mean[0, 0].item(), 4)  # ln 2 for the first feature, 0 for the second
    0.3466
    """

    def __init__(self, places: int, replicates: int = 0) -> None:
        self.sums = ResampledSums(places + 1, replicates)

    def update(self, sequences: Iterable[Sequence[Tensor]], weights: Tensor | None = None) -> None:
        """Add sequences.

        Parameters
        ----------
        sequences : iterable of sequence of torch.Tensor
            For each sequence one tensor a place, of shape (tokens, features).
        weights : torch.Tensor, optional
            Of the resamples, of shape (sequences, replicates).
        """
        self.sums.add(torch.stack([self._sums_of(states) for states in sequences]), weights)

    @property
    def mean(self) -> Tensor:
        """Mean entropy in nats a feature, of shape (1 + replicates, places), float64."""
        return self.sums.rows[:, :-1] / self.sums.rows[:, -1:]

    @property
    def count(self) -> Tensor:
        """Tokens, of shape (1 + replicates,), of sequences with two at least."""
        return self.sums.rows[:, -1]

    def _sums_of(self, states: Sequence[Tensor]) -> Tensor:
        tokens, features = states[0].shape
        if tokens < 2:
            return torch.zeros(self.sums.rows.shape[1], dtype=torch.float64)
        # One pair of buffers for all places: fresh ones of this size would cost more than what is done in them.
        dtype = torch.promote_types(states[0].dtype, torch.float32)
        device = states[0].device
        scaled = torch.empty(tokens, features, dtype=dtype, device=device)
        bucket = torch.empty(tokens, features, dtype=torch.int32, device=device)
        offset = torch.arange(features, dtype=torch.int32, device=device) * _BUCKETS
        entropies = []
        for state in states:
            scaled.copy_(state)
            least = scaled.amin(dim=0)
            scale = _BUCKETS / (scaled.amax(dim=0) - least)
            scale.masked_fill_(~scale.isfinite(), 0.0)  # all values are the same
            bucket.copy_(scaled.sub_(least).mul_(scale).clamp_max_(_BUCKETS - 1)).add_(offset)
            counts = torch.bincount(bucket.flatten(), minlength=features * _BUCKETS)
            entropies.append(torch.special.entr(counts.cpu().to(torch.float64) / tokens).sum() / features)
        return torch.stack([*entropies, torch.ones((), dtype=torch.float64)]) * tokens
