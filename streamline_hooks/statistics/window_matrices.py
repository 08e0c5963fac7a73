"""What a profile tells of a window, for all windows at once."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from streamline_hooks.statistics.state_sums import StateSums

Statistic = Literal["cosine", "angular", "last_angular", "relative_magnitude", "entropy"]


def window_matrices(sums: StateSums, statistic: Statistic) -> Tensor:
    """A statistic of every window, and the same in each resample.

    Parameters
    ----------
    sums : StateSums
    statistic : {"cosine", "angular", "last_angular", "relative_magnitude", "entropy"}
        Of the states a and b around a window: how alike or distant they are; the relative magnitudes of the window's
        blocks, summed; by how much the entropy increases from a to b.

    Returns
    -------
    torch.Tensor
        Of shape (1 + replicates, places, places), float64; the window ``range(a, b)`` is at [:, a, b].
    """
    match statistic:
        case "cosine":
            return sums.similarity.cosine
        case "angular":
            return sums.similarity.angular
        case "last_angular":
            return sums.last.angular
        case "relative_magnitude":
            upto = pad(sums.norms.relative_magnitude.cumsum(dim=1), (1, 0))
            return (upto[:, None, :] - upto[:, :, None]).abs()
        case "entropy":
            return sums.entropy.mean[:, None, :] - sums.entropy.mean[:, :, None]
