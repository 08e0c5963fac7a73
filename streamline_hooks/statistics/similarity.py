"""How alike the states along the residual stream are, for every pair of places at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streamline_hooks.statistics.bootstrap import ResampledSums

# Float64 inner products of a thousand features are off by less. It moves no angle by more than 4.5e-8 of π.
_ROUNDING = 1e-14


class StateSimilarity:
    """Sums of cosine and angular distance between every two of the L + 1 states of a token.

    Place k is what enters block k, place L what leaves the last block. One pass ranks every window of every length:
    the window ``range(a, b)`` changes state a into state b.

    Parameters
    ----------
    places : int
        L + 1.
    replicates : int
        Number of resamples, see `ResampledSums`.

    Notes
    -----
    The angular distance of a token is arccos(cosine)/π, in [0, 1] (Gromov et al., arXiv 2403.17887, eq. 8), and its
    mean is the mean of the tokens' distances. States of the same direction are at a distance of exactly 0. A state of
    zeros has cosine 0 with any other. All sums are float64; memory does not grow with the tokens.

    Examples
    --------
    >>> from streamline_hooks.statistics.gram import token_grams
    >>> similarity = StateSimilarity(2)
    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> similarity.update([token_grams([a, b], torch.tensor([0]))])
    >>> similarity.cosine[0, 0, 1].item(), similarity.angular[0, 0, 1].item()
    (0.0, 0.5)
    """

    def __init__(self, places: int, replicates: int = 0) -> None:
        self.places = places
        self._pairs = torch.triu_indices(places, places, 1)
        self.sums = ResampledSums(2 * self._pairs.shape[1] + 1, replicates)

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

    @property
    def cosine(self) -> Tensor:
        """Mean cosine, of shape (1 + replicates, places, places), float64: the mean, then that of each resample."""
        return self._matrices(self._means[:, : self._pairs.shape[1]], 1.0)

    @property
    def angular(self) -> Tensor:
        """Mean angular distance in [0, 1], of shape (1 + replicates, places, places), float64."""
        return self._matrices(self._means[:, self._pairs.shape[1] : -1], 0.0)

    @property
    def count(self) -> Tensor:
        """Tokens, of shape (1 + replicates,)."""
        return self.sums.rows[:, -1]

    @property
    def _means(self) -> Tensor:
        return self.sums.rows / self.count[:, None]

    def _sums_of(self, gram: Tensor) -> Tensor:
        rows, columns = self._pairs.to(gram.device)
        norm = gram.diagonal(dim1=1, dim2=2).sqrt()
        cosine = gram.flatten(1)[:, rows * self.places + columns]
        # One division after the other: the product of two norms may overflow.
        cosine.div_(norm[:, rows]).div_(norm[:, columns]).nan_to_num_(nan=0.0)
        cosine.masked_fill_(cosine > 1.0 - _ROUNDING, 1.0).clamp_min_(-1.0)
        summed = [cosine.sum(dim=0), cosine.arccos_().sum(dim=0) / math.pi]
        return torch.cat([*summed, summed[0].new_tensor([len(gram)])]).cpu()

    def _matrices(self, values: Tensor, diagonal: float) -> Tensor:
        matrices = torch.full((len(values), self.places, self.places), diagonal, dtype=torch.float64)
        rows, columns = self._pairs
        matrices[:, rows, columns] = matrices[:, columns, rows] = values
        return matrices
