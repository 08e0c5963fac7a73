"""Medians of norms from counts that can be added up, over batches and over processes."""

from __future__ import annotations

import torch
from torch import Tensor

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
