"""How a quantity of nats is spread over tokens, in memory that does not grow with them."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError

_LEAST, _MOST, _A_DECADE = -8, 3, 100  # powers of ten; bins between two of them, so 2.3 % apart
_BINS = (_MOST - _LEAST) * _A_DECADE + 2  # with what is below and what is above


@dataclass(frozen=True)
class NatsHistogram:
    """Counts of tokens in bins of equal ratio from 1e-8 to 1e3 nats.

    Attributes
    ----------
    counts : tuple of int
        Empty, or one a bin, of which the first holds everything below, zero too, and the last everything above.

    Examples
    --------
    >>> spread = NatsHistogram.of(torch.tensor([0.1, 0.2, 0.3, 4.0]))
    >>> round((spread + spread).quantile(0.5), 2)
    0.2
    """

    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, nats: Tensor) -> NatsHistogram:
        """Of one number a token, of any shape."""
        bins = ((nats.double().clamp_min(1e-300).log10() - _LEAST) * _A_DECADE).floor() + 1
        counted = torch.bincount(bins.clamp(0, _BINS - 1).long().flatten(), minlength=_BINS)
        return cls(tuple(counted.tolist()))

    def quantile(self, share: float) -> float:
        """What a share of the tokens does not exceed, to the middle of its bin: within 1.2 %.

        Raises
        ------
        StreamlineError
            If no token was counted.
        """
        reached = list(accumulate(self.counts))
        if not self.counts or not reached[-1]:
            raise StreamlineError("No token was counted, so that there is no quantile of them.")
        number = bisect_left(reached, max(1, math.ceil(share * reached[-1])))
        if number == 0:
            return 0.0
        return float(10.0 ** (_LEAST + (min(number, _BINS - 2) - 0.5) / _A_DECADE))

    def __add__(self, other: NatsHistogram) -> NatsHistogram:
        if not self.counts or not other.counts:
            return self if self.counts else other
        return NatsHistogram(tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))
