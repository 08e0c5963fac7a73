"""How long the states are, how much each block changes them, and where massive activations are born."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamline_hooks.statistics.bootstrap import ResampledSums

_CELLS_AN_OCTAVE, _LOWEST = 16, -64
_CELLS = 2 * -_LOWEST * _CELLS_AN_OCTAVE


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

    The median is read off a histogram of the logarithm, of 16 cells an octave from 2⁻⁶⁴ to 2⁶⁴: it is the centre of
    the cell that the (lower) median lies in, so it is right to 2.2 %. Norms outside count in the outermost cells.

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
        self.histogram = torch.zeros(places, _CELLS, dtype=torch.int64)
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
            cells = ((every.log2() - _LOWEST) * _CELLS_AN_OCTAVE).clamp_(0, _CELLS - 1).to(torch.int64)
            cells += torch.arange(self.places, device=cells.device) * _CELLS
            self.histogram += torch.bincount(cells.flatten(), minlength=self.places * _CELLS).view(-1, _CELLS).cpu()
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
        reached = self.histogram.cumsum(dim=1)
        cell = (reached * 2 < reached[:, -1:]).sum(dim=1)
        centre = torch.exp2((cell.to(torch.float64) + 0.5) / _CELLS_AN_OCTAVE + _LOWEST)
        return torch.where(cell > 0, centre, 0.0)

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
