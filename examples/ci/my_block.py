"""A custom block that replaces transformer blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Map hidden states of shape (batch, tokens, features) to the same shape, independently for each token."""

    def __init__(self, features: int, hidden: int = 8) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features)
        self.down = nn.Linear(features, hidden)
        self.up = nn.Linear(hidden, features)

    def forward(self, state: Tensor) -> Tensor:
        """Add the output of the bottleneck to the hidden state."""
        return state + self.up(torch.relu(self.down(self.norm(state))))
