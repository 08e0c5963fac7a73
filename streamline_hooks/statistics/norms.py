"""Sum the norms of the hidden states at each boundary, their histograms, and the entropy of the states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from streamline_hooks.statistics.bootstrap import ResampledSums

_BINS_PER_OCTAVE, _LOWEST = 16, -64
HISTOGRAM_BINS = 2 * -_LOWEST * _BINS_PER_OCTAVE


def norm_histogram(norms: Tensor, counted: Tensor | None = None) -> Tensor:
    """Count norms of shape (tokens, boundaries) in 16 logarithmic bins per octave, from 2⁻⁶⁴ to 2⁶⁴.

    The result is an int64 tensor of shape (boundaries, `HISTOGRAM_BINS`). Values out of range are counted in the
    outermost bins, NaN in the lowest. `counted`, of shape (tokens,), selects tokens.
    """
    num_boundaries = norms.shape[1]
    bins = (
        ((norms.log2() - _LOWEST) * _BINS_PER_OCTAVE).nan_to_num(nan=0.0).clamp(0, HISTOGRAM_BINS - 1).to(torch.int64)
    )
    bins = (bins + torch.arange(num_boundaries, device=bins.device) * HISTOGRAM_BINS).flatten()
    ones = torch.ones_like(bins) if counted is None else counted.to(torch.int64).repeat_interleave(num_boundaries)
    return (
        ones.new_zeros(num_boundaries * HISTOGRAM_BINS).scatter_add_(0, bins, ones).view(num_boundaries, HISTOGRAM_BINS)
    )


def median_of_histogram(histogram: Tensor) -> Tensor:
    """Return the bin center of the lower median, float64 of shape (boundaries,); 0 for the lowest bin.

    The center is accurate to 2.2 %.
    """
    cumulative = histogram.cumsum(dim=1)
    index = (cumulative * 2 < cumulative[:, -1:]).sum(dim=1)
    center = torch.exp2((index.to(torch.float64) + 0.5) / _BINS_PER_OCTAVE + _LOWEST)
    return torch.where(index > 0, center, 0.0)


class StateNorms:
    """Norms at each boundary, and the relative magnitude ‖leaving − entering‖/‖entering‖ of each block.

    The relative magnitude excludes tokens whose entering state is zero and is accurate to 1e-8. The median is computed
    from a histogram and is accurate to 2.2 %, see `norm_histogram`.
    """

    def __init__(self, num_boundaries: int, replicates: int = 0) -> None:
        self.num_boundaries = num_boundaries
        self.sums = ResampledSums(3 * num_boundaries - 1, replicates)
        self.histogram = torch.zeros(num_boundaries, HISTOGRAM_BINS, dtype=torch.int64)
        self.largest = torch.zeros(num_boundaries, dtype=torch.float64)

    def update(self, grams: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """Add the `token_grams`, (tokens, boundaries, boundaries), of each sequence, and the bootstrap weights."""
        self.sums.add(torch.stack([self._sums_of(gram) for gram in grams]), weights)
        norms = torch.cat([gram.diagonal(dim1=1, dim2=2).sqrt() for gram in grams])
        if len(norms):
            self.histogram += norm_histogram(norms).cpu()
            self.largest = torch.maximum(self.largest, norms.amax(dim=0).cpu())

    @property
    def mean(self) -> Tensor:
        """Mean norm, of shape (1 + replicates, boundaries), float64."""
        return self.sums.rows[:, : self.num_boundaries] / self.sums.rows[:, -1:]

    @property
    def relative_magnitude(self) -> Tensor:
        """Mean relative magnitude, of shape (1 + replicates, blocks), float64."""
        return (
            self.sums.rows[:, self.num_boundaries : 2 * self.num_boundaries - 1]
            / self.sums.rows[:, 2 * self.num_boundaries - 1 : -1]
        )

    @property
    def median(self) -> Tensor:
        """Median norm, of shape (boundaries,), float64."""
        return median_of_histogram(self.histogram)

    def _sums_of(self, gram: Tensor) -> Tensor:
        squared, product = gram.diagonal(dim1=1, dim2=2), gram.diagonal(offset=1, dim1=1, dim2=2)
        change = (squared[:, :-1] + squared[:, 1:] - 2 * product).clamp_min_(0.0).sqrt_()
        norm = squared.sqrt()
        entering = norm[:, :-1] > 0
        relative = torch.where(entering, change / norm[:, :-1], 0.0)
        sums = [values.sum(dim=0) for values in (norm, relative, entering)]
        return torch.cat([*sums, gram.new_full((1,), len(gram))])


_BUCKETS = 20


def _counts(values: Tensor, size: int) -> Tensor:
    """Return how often each number below `size` occurs."""
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=size)
    # torch.bincount reads the largest value, for which the host would wait.
    counts = torch.zeros(size, dtype=torch.long, device=values.device)
    return counts.scatter_add_(0, values.long(), torch.ones_like(values, dtype=torch.long))


class StateEntropy:
    """Entropy of the hidden states at each boundary, by the bucket estimator of EntroDrop (arXiv 2504.03794).

    The range of each feature within a sequence is divided into 20 buckets. The entropy −Σ p ln p of the token shares,
    in nats, is averaged over the features and over the sequences, weighted by tokens. The entropy of n tokens is at
    most ln n, so compare only profiles with sequences of similar length. Constant features have entropy 0, and
    sequences of one token are excluded. A token with massive activations enlarges the range of every feature; skip it
    (usually the first token).
    """

    def __init__(self, num_boundaries: int, replicates: int = 0) -> None:
        self.sums = ResampledSums(num_boundaries + 1, replicates)

    def update(self, sequences: Iterable[Sequence[Tensor]], weights: Tensor | None = None) -> None:
        """Add the states of each sequence, one tensor (tokens, features) per boundary, and the bootstrap weights."""
        self.sums.add(torch.stack([self._sums_of(states) for states in sequences]), weights)

    @property
    def mean(self) -> Tensor:
        """Mean entropy in nats per feature, of shape (1 + replicates, boundaries), float64."""
        return self.sums.rows[:, :-1] / self.sums.rows[:, -1:]

    @property
    def count(self) -> Tensor:
        """Number of tokens in sequences with at least two tokens, of shape (1 + replicates,)."""
        return self.sums.rows[:, -1]

    def _sums_of(self, states: Sequence[Tensor]) -> Tensor:
        tokens, features = states[0].shape
        if tokens < 2:
            return torch.zeros(self.sums.rows.shape[1], dtype=torch.float64)
        # Reuse buffers for all boundaries: allocating them would cost more than the computation.
        dtype = torch.promote_types(states[0].dtype, torch.float32)
        device = states[0].device
        scaled = torch.empty(tokens, features, dtype=dtype, device=device)
        bucket = torch.empty(tokens, features, dtype=torch.int32, device=device)
        offset = torch.arange(features, dtype=torch.int32, device=device) * _BUCKETS
        counts = []
        for state in states:
            scaled.copy_(state)
            minimum = scaled.amin(dim=0)
            scale = _BUCKETS / (scaled.amax(dim=0) - minimum)
            scale.masked_fill_(~scale.isfinite(), 0.0)  # constant features
            bucket.copy_(scaled.sub_(minimum).mul_(scale).clamp_max_(_BUCKETS - 1)).add_(offset)
            counts.append(_counts(bucket.flatten(), features * _BUCKETS))
        fractions = torch.stack(counts).cpu().to(torch.float64) / tokens
        entropies = [torch.special.entr(row).sum() / features for row in fractions]
        return torch.stack([*entropies, torch.ones((), dtype=torch.float64)]) * tokens
