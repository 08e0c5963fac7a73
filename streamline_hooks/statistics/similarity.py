"""How alike the states along the residual stream are, for every pair of places at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError
from streamline_hooks.statistics.precision import widen

_TOKENS_AT_ONCE = 1024


class StateSimilarity:
    """Sums of cosine and angular distance between every two of the L + 1 states of a token.

    State k is what enters block k, state L what leaves the last block. One pass ranks every window of every length:
    the window ``range(a, b)`` changes state a into state b.

    Parameters
    ----------
    states : int
        L + 1.

    Notes
    -----
    The angular distance of a token is arccos(cosine)/π, in [0, 1] (Gromov et al., arXiv 2403.17887, eq. 8), and its
    mean is the mean of the tokens' distances. All sums are float64; memory does not grow with the tokens.

    Examples
    --------
    >>> import torch
    >>> similarity = StateSimilarity(2)
    >>> similarity.update([torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])], torch.ones(1, 1))
    >>> similarity.cosine[0, 1].item(), similarity.angular[0, 1].item()
    (0.0, 0.5)
    """

    def __init__(self, states: int) -> None:
        self.tokens = 0
        self._cosine = torch.zeros(states, states, dtype=torch.float64)
        self._angular = torch.zeros(states, states, dtype=torch.float64)

    def update(self, states: Sequence[Tensor], mask: Tensor) -> None:
        """Add one batch.

        Parameters
        ----------
        states : sequence of torch.Tensor
            L + 1 tensors of shape (batch, tokens, features), in order.
        mask : torch.Tensor
            The tokens that count, of shape (batch, tokens).
        """
        if len(states) != len(self._cosine):
            raise StreamlineError(f"Got {len(states)} states; expected {len(self._cosine)}, one more than blocks.")
        chosen = [state[mask.to(state.device).bool()] for state in states]
        for parts in zip(*(c.split(_TOKENS_AT_ONCE) for c in chosen), strict=True):
            stacked = torch.stack([widen(part) for part in parts], dim=1)
            stacked /= stacked.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            gram = (stacked @ stacked.transpose(1, 2)).clamp_(-1.0, 1.0)
            gram.diagonal(dim1=1, dim2=2).fill_(1.0)
            self._cosine += gram.sum(dim=0).cpu()
            self._angular += gram.arccos_().sum(dim=0).cpu() / math.pi
            self.tokens += len(gram)

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the tokens."""
        if other._cosine.shape != self._cosine.shape:
            raise StreamlineError(
                f"Cannot merge the similarity of {len(other._cosine)} states into that of {len(self._cosine)}: they "
                "are of different models."
            )
        self.tokens += other.tokens
        self._cosine += other._cosine
        self._angular += other._angular

    @property
    def cosine(self) -> Tensor:
        """Mean cosine of shape (L + 1, L + 1), float64."""
        return self._cosine / self._counted()

    @property
    def angular(self) -> Tensor:
        """Mean angular distance in [0, 1], of shape (L + 1, L + 1), float64."""
        return self._angular / self._counted()

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a file."""
        return {"tokens": self.tokens, "cosine": self._cosine.clone(), "angular": self._angular.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take sums up again."""
        self.tokens = int(state["tokens"])
        self._cosine, self._angular = state["cosine"].clone(), state["angular"].clone()

    def _counted(self) -> int:
        if not self.tokens:
            raise StreamlineError("No token has been counted yet; update with a batch that has real tokens.")
        return self.tokens
