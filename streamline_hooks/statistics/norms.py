"""Norms of the hidden states at each position in the stack, their histogram, and the entropy of the states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from streamline_hooks.statistics.bootstrap import ResampledSums

_CELLS_AN_OCTAVE, _LOWEST = 16, -64
CELLS = 2 * -_LOWEST * _CELLS_AN_OCTAVE


def norm_histogram(norms: Tensor, counted: Tensor | None = None) -> Tensor:
    """Count norms of shape (tokens, places) by logarithm: 16 cells an octave from 2⁻⁶⁴ to 2⁶⁴, int64 (places, `CELLS`).

    Values outside fall into the outermost cells, NaN into the lowest. `counted`, of shape (tokens,), selects tokens.
    """
    places = norms.shape[1]
    cells = ((norms.log2() - _LOWEST) * _CELLS_AN_OCTAVE).nan_to_num(nan=0.0).clamp(0, CELLS - 1).to(torch.int64)
    cells = (cells + torch.arange(places, device=cells.device) * CELLS).flatten()
    ones = torch.ones_like(cells) if counted is None else counted.to(torch.int64).repeat_interleave(places)
    return ones.new_zeros(places * CELLS).scatter_add_(0, cells, ones).view(places, CELLS)


def median_norm(histogram: Tensor) -> Tensor:
    """Return the lower median's cell centre (right to 2.2 %), float64 of shape (places,); 0 in the lowest cell."""
    reached = histogram.cumsum(dim=1)
    cell = (reached * 2 < reached[:, -1:]).sum(dim=1)
    centre = torch.exp2((cell.to(torch.float64) + 0.5) / _CELLS_AN_OCTAVE + _LOWEST)
    return torch.where(cell > 0, centre, 0.0)


class StateNorms:
    """Norms at each boundary, and each block's relative magnitude ‖leaving − entering‖/‖entering‖.

    Tokens whose entering state is zero are left out of the relative magnitude, which is accurate to 1e-8. The median
    comes from a histogram and is right to 2.2 %, see `norm_histogram`.
    """

    def __init__(self, places: int, replicates: int = 0) -> None:
        self.places = places
        self.sums = ResampledSums(3 * places - 1, replicates)
        self.histogram = torch.zeros(places, CELLS, dtype=torch.int64)
        self.largest = torch.zeros(places, dtype=torch.float64)

    def update(self, grams: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """Add sequences, each with `token_grams` of shape (tokens, places, places), and their bootstrap weights."""
        self.sums.add(torch.stack([self._sums_of(gram) for gram in grams]), weights)
        every = torch.cat([_norms(gram) for gram in grams])
        if len(every):
            self.histogram += norm_histogram(every).cpu()
            self.largest = torch.maximum(self.largest, every.amax(dim=0).cpu())

    @property
    def mean(self) -> Tensor:
        """Mean norm, of shape (1 + replicates, places), float64."""
        return self.sums.rows[:, : self.places] / self.sums.rows[:, -1:]

    @property
    def relative_magnitude(self) -> Tensor:
        """Mean relative magnitude, of shape (1 + replicates, blocks), float64."""
        return self.sums.rows[:, self.places : 2 * self.places - 1] / self.sums.rows[:, 2 * self.places - 1 : -1]

    @property
    def median(self) -> Tensor:
        """Median norm, of shape (places,), float64."""
        return median_norm(self.histogram)

    def _sums_of(self, gram: Tensor) -> Tensor:
        squared, across = gram.diagonal(dim1=1, dim2=2), gram.diagonal(offset=1, dim1=1, dim2=2)
        change = (squared[:, :-1] + squared[:, 1:] - 2 * across).clamp_min_(0.0).sqrt_()
        norm = squared.sqrt()
        entering = norm[:, :-1] > 0
        relative = torch.where(entering, change / norm[:, :-1], 0.0)
        return torch.cat(
            [norm.sum(dim=0), relative.sum(dim=0), entering.sum(dim=0), gram.new_tensor([len(gram)])]
        ).cpu()


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).sqrt()


_BUCKETS = 20


class StateEntropy:
    """Entropy of the hidden states at each boundary, by the bucket estimator of EntroDrop (arXiv 2504.03794).

    Each feature's range within a sequence is divided into 20 buckets, and −Σ p ln p of the shares of tokens is averaged
    over the features, in nats, and over the sequences, weighted by tokens. A sequence of n tokens has at most ln n, so
    compare profiles of like sequences only. Constant features have entropy 0; they and sequences of one token are left
    out. A massive token stretches the range of every feature; skip it (usually the first token) to see past it.
    """

    def __init__(self, places: int, replicates: int = 0) -> None:
        self.sums = ResampledSums(places + 1, replicates)

    def update(self, sequences: Iterable[Sequence[Tensor]], weights: Tensor | None = None) -> None:
        """Add sequences, each with one tensor per boundary of shape (tokens, features), and their bootstrap weights."""
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
