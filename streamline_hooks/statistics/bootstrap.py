"""A Poisson bootstrap of means over sequences, which needs one pass and merges by addition."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError

# P(N ≤ k) for N ~ Poisson(1), k = 0, 1, ...; from 18 on it is 1 in float64.
_POISSON = np.cumsum([math.exp(-1.0) / math.factorial(k) for k in range(18)])


def poisson_weights(contents: Sequence[bytes], replicates: int) -> Tensor:
    """How often each sequence is drawn in each resample.

    In a bootstrap of many sequences a sequence's count is all but Poisson(1), and independent of the others', so that
    a sequence can be weighted when it comes by and forgotten (Chamandy et al., Estimating Uncertainty for Massive
    Data Streams, 2012). Here the counts follow from the sequence's content alone: 53 bits of SHAKE-128 a replicate,
    through the inverse of the distribution. So they are the same in whatever batch, order or shard it comes, and in
    whatever pass over the same text. Sequences of the same content are drawn together.

    Parameters
    ----------
    contents : sequence of bytes
        One a sequence.
    replicates : int
        R, the number of resamples.

    Returns
    -------
    torch.Tensor
        Of shape (sequences, R), float64.

    Examples
    --------
    >>> poisson_weights([b"one", b"another"], 6).int().tolist()
    [[2, 0, 1, 4, 0, 2], [1, 0, 0, 1, 5, 2]]
    """
    digests = b"".join(hashlib.shake_128(content).digest(8 * replicates) for content in contents)
    uniform = (np.frombuffer(digests, dtype="<u8") >> 11) * 2.0**-53
    counts = np.searchsorted(_POISSON, uniform, side="right").astype(np.float64)
    return torch.from_numpy(counts.reshape(len(contents), replicates))


class ResampledSums:
    """Sums over sequences, and the same sums over R resamples of the sequences, in constant memory.

    `rows`, of shape (1 + R, width), float64 on the CPU, holds the sums and then those of each resample.
    """

    def __init__(self, width: int, replicates: int = 0) -> None:
        self.rows = torch.zeros(1 + replicates, width, dtype=torch.float64)

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add sequences of shape (sequences, width), with the `poisson_weights` of shape (sequences, R) if R > 0."""
        values = values.cpu().to(torch.float64)
        self.rows[0] += values.sum(dim=0)
        replicates = len(self.rows) - 1
        if replicates:
            if weights is None or weights.shape != (len(values), replicates):
                got = "none" if weights is None else tuple(weights.shape)
                raise StreamlineError(
                    f"Got weights of shape {got}; expected {(len(values), replicates)} (sequences, replicates)."
                )
            self.rows[1:] += weights.to(torch.float64).T @ values

    def merge(self, other: Self) -> None:
        """Add the sums over other sequences."""
        self.rows = self.rows + other.rows
