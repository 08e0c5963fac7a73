"""What a monitored step sums over its tokens, in place and without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from streamline_hooks.precision import widest
from streamline_hooks.statistics.norms import CELLS, norm_histogram


class NormSums:
    """The norms of the states at one place of the residual stream.

    Parameters
    ----------
    device : torch.device
        Where the states are.

    Attributes
    ----------
    added : torch.Tensor
        Tokens, tokens whose state is not finite, and the sum of the norms, float64, of shape (3,).
    largest : torch.Tensor
        The greatest norm, of shape (1,).
    histogram : torch.Tensor
        See `norm_histogram`, of shape (1, `CELLS`).
    """

    def __init__(self, device: torch.device) -> None:
        self.added = torch.zeros(3, dtype=widest(device), device=device)
        self.largest = torch.zeros(1, device=device)
        self.histogram = torch.zeros(1, CELLS, dtype=torch.int64, device=device)

    def update(self, norm: Tensor, real: Tensor) -> None:
        """Add the norms of a batch, float32, of which `real` says which count; both of shape (batch, tokens)."""
        finite = norm.isfinite()
        counted, norm = real & finite, torch.where(real & finite, norm, 0.0)
        self.added.add_(torch.stack([real.sum(), (real & ~finite).sum(), norm.sum(dtype=self.added.dtype)]))
        self.largest.copy_(torch.maximum(self.largest, norm.max()))
        self.histogram.add_(norm_histogram(norm.reshape(-1, 1), counted.flatten()))

    def zero(self) -> None:
        """Begin anew."""
        for sums in (self.added, self.largest, self.histogram):
            sums.zero_()


class ChangeSums:
    """What one block does to its tokens' states.

    Parameters
    ----------
    device : torch.device
        Where the states are.

    Attributes
    ----------
    added : torch.Tensor
        Tokens with finite states, and the sums over them of the cosine and of ‖leaving − entering‖/‖entering‖, float64,
        of shape (3,). A token that enters with zeros has cosine 0 and change 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.added = torch.zeros(3, dtype=widest(device), device=device)

    def update(self, entering: Tensor, leaving: Tensor, real: Tensor) -> None:
        """Add a batch: two states of shape (batch, tokens, features), float32, and which tokens count."""
        before, after = norms_of(entering), norms_of(leaving)
        scale = torch.where(before > 0, before, 1.0)
        cosine = (entering * leaving).sum(dim=-1) / scale / torch.where(after > 0, after, 1.0)
        change = torch.where(before > 0, norms_of(leaving - entering) / scale, 0.0)
        counted = real & cosine.isfinite() & change.isfinite()
        summed = [
            torch.where(counted, values, 0.0).sum(dtype=self.added.dtype)
            for values in (cosine.clamp(-1.0, 1.0), change)
        ]
        self.added.add_(torch.stack([counted.sum().to(self.added.dtype), *summed]))

    def zero(self) -> None:
        """Begin anew."""
        self.added.zero_()


def norms_of(state: Tensor) -> Tensor:
    """The norm of each token's state, of shape (batch, tokens)."""
    return torch.linalg.vector_norm(state, dim=-1)
