"""A block of one's own, to stand in the place of others."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Map states of shape (batch, tokens, features) to the same shape, each token for itself."""

    def __init__(self, features: int, inside: int = 8) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features)
        self.down = nn.Linear(features, inside)
        self.up = nn.Linear(inside, features)

    def forward(self, state: Tensor) -> Tensor:
        """Add what comes through the bottleneck."""
        return state + self.up(torch.relu(self.down(self.norm(state))))
