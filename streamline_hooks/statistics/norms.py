"""How long the states are, how much each block changes them, and where massive activations are born."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamline_hooks.statistics.bootstrap import ResampledSums
from streamline_hooks.statistics.norm_histogram import CELLS, median_norm, norm_histogram


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
    >>> from streamline_hooks.statistics.gram import token_grams
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
