"""Labels for next-token prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNCOUNTED = -100  # in the place of a token where none is to be predicted, as PyTorch and Transformers have it


def predicted_tokens(real: Tensor, positions: Any = None) -> Tensor:
    """Return which tokens are predicted from the previous one, boolean of shape (batch, tokens − 1).

    Both must be real. In a packed row, where positions of shape (batch or 1, tokens) restart with each document, the
    first token of a document does not count. Positions of another shape are ignored.
    """
    found = real[:, 1:] & real[:, :-1]
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == real.shape[1]:
        found = found & (positions.to(real.device).diff(dim=1) == 1)
    return found


def following_tokens(ids: Tensor, real: Tensor, positions: Any = None) -> Tensor:
    """Return the next token, or `UNCOUNTED`, for each token, (batch, tokens); see `predicted_tokens`."""
    found = torch.full_like(ids, UNCOUNTED)
    found[:, :-1] = torch.where(predicted_tokens(real, positions), ids[:, 1:], UNCOUNTED)
    return found
