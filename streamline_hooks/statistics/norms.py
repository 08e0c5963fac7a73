"""Norms of the hidden states at each position in the stack, their histogram, and the entropy of the states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from streamline_hooks.statistics.bootstrap import ResampledSums

_CELLS_AN_OCTAVE, _LOWEST = 16, -64
CELLS = 2 * -_LOWEST * _CELLS_AN_OCTAVE


def norm_histogram(norms: Tensor, counted: Tensor | None = None) -> Tensor:
    """Count norms by their logarithm: 16 cells an octave from 2⁻⁶⁴ to 2⁶⁴, what is outside in the outermost ones.

    Parameters
    ----------
    norms : torch.Tensor
        Of shape (tokens, places). NaN counts in the lowest cell.
    counted : torch.Tensor, optional
        Which tokens count, boolean, of shape (tokens,); all by default.

    Returns
    -------
    torch.Tensor
        Of shape (places, `CELLS`), int64.

    Examples
    --------
    >>> histogram = norm_histogram(torch.tensor([[1.0], [3.0], [300.0]]))
    >>> histogram.sum().item(), round(median_norm(histogram)[0].item(), 2)
    (3, 3.02)
    """
    places = norms.shape[1]
    cells = ((norms.log2() - _LOWEST) * _CELLS_AN_OCTAVE).nan_to_num(nan=0.0).clamp(0, CELLS - 1).to(torch.int64)
    cells = (cells + torch.arange(places, device=cells.device) * CELLS).flatten()
    ones = torch.ones_like(cells) if counted is None else counted.to(torch.int64).repeat_interleave(places)
    return ones.new_zeros(places * CELLS).scatter_add_(0, cells, ones).view(places, CELLS)


def median_norm(histogram: Tensor) -> Tensor:
    """The centre of the cell that the (lower) median lies in, so right to 2.2 %; 0 in the lowest cell.

    Parameters
    ----------
    histogram : torch.Tensor
        See `norm_histogram`; sums of such too.

    Returns
    -------
    torch.Tensor
        Of shape (places,), float64, on the histogram's device.
    """
    reached = histogram.cumsum(dim=1)
    cell = (reached * 2 < reached[:, -1:]).sum(dim=1)
    centre = torch.exp2((cell.to(torch.float64) + 0.5) / _CELLS_AN_OCTAVE + _LOWEST)
    return torch.where(cell > 0, centre, 0.0)


class StateNorms:
    """Norms at each place of the residual stream, and the relative magnitude of each block.

    Parameters
    ----------
    places : int
        L + 1.
    replicates : int
        Number of resamples, see `ResampledSums`.

    Notes
    -----
    The relative magnitude of a block for a token is ‖leaving − entering‖/‖entering‖; tokens whose entering state is
    zero are left out of its mean. It is accurate to 1e-8.

    The median is read off a histogram and right to 2.2 %, see `norm_histogram`.

    Examples
    --------
    >>> from streamline_hooks.statistics.state_sums import token_grams
    >>> norms = StateNorms(2)
    >>> norms.update([token_grams([torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 14.0]])], torch.tensor([0]))])
    >>> norms.mean[0, 0].item(), norms.relative_magnitude[0].tolist()
    (5.0, [2.0])
    """

    def __init__(self, places: int, replicates: int = 0) -> None:
        self.places = places
        self.sums = ResampledSums(3 * places - 1, replicates)
        self.histogram = torch.zeros(places, CELLS, dtype=torch.int64)
        self.largest = torch.zeros(places, dtype=torch.float64)

    def update(self, grams: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """Add sequences.

        Parameters
        ----------
        grams : sequence of torch.Tensor
            One a sequence, of shape (tokens, places, places), see `token_grams`.
        weights : torch.Tensor, optional
            Of the resamples, of shape (sequences, replicates).
        """
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
