"""Which tokens of a batch are predicted, from which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNCOUNTED = -100  # in the place of a token where none is to be predicted, as PyTorch and Transformers have it


def predicted_tokens(real: Tensor, positions: Any = None) -> Tensor:
    """Say of each token but a row's first whether it is to be predicted from what stands before it in its row.

    That is a real token behind a real one; in a packed row, where positions begin again with each document, not the
    first of a document, which the one before it says nothing of.

    Parameters
    ----------
    real : torch.Tensor
        Boolean, of shape (batch, tokens).
    positions : torch.Tensor, optional
        Of shape (batch, tokens), or (1, tokens) for all rows; of another shape (several axes) they are not looked at.

    Returns
    -------
    torch.Tensor
        Boolean, of shape (batch, tokens − 1).

    Examples
    --------
    >>> import torch
    >>> predicted_tokens(torch.tensor([[False, True, True, True, True]])).tolist()
    [[False, True, True, True]]
    >>> predicted_tokens(torch.ones(1, 5, dtype=torch.bool), torch.tensor([[0, 1, 2, 0, 1]])).tolist()
    [[True, True, False, True]]
    """
    found = real[:, 1:] & real[:, :-1]
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == real.shape[1]:
        found = found & (positions.to(real.device).diff(dim=1) == 1)
    return found


def following_tokens(ids: Tensor, real: Tensor, positions: Any = None) -> Tensor:
    """The token that each one is to predict: the next, where `predicted_tokens` says so.

    Parameters
    ----------
    ids : torch.Tensor
        The text, of shape (batch, tokens).
    real, positions : torch.Tensor
        See `predicted_tokens`.

    Returns
    -------
    torch.Tensor
        Of shape (batch, tokens), `UNCOUNTED` where none is to be predicted.

    Examples
    --------
    >>> import torch
    >>> following_tokens(torch.tensor([[0, 5, 6, 7]]), torch.tensor([[False, True, True, True]])).tolist()
    [[-100, 6, 7, -100]]
    """
    found = torch.full_like(ids, UNCOUNTED)
    found[:, :-1] = torch.where(predicted_tokens(real, positions), ids[:, 1:], UNCOUNTED)
    return found
