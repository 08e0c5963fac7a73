"""Hadamard matrices, of the orders that widths of models have."""

from __future__ import annotations

import torch
from torch import Tensor

from streamline_hooks import StreamlineError


def hadamard(order: int) -> Tensor:
    """A matrix of ±1 whose rows are orthogonal, divided by the root of its order: its own inverse's transpose.

    By Sylvester's doubling from a matrix of Paley's (Journal of Mathematics and Physics 12, 1933): of order q + 1 for
    a prime q ≡ 3 (mod 4), or 2·(q + 1) for a prime q ≡ 1 (mod 4).

    Parameters
    ----------
    order : int

    Returns
    -------
    torch.Tensor
        Of shape (order, order), float64.

    Raises
    ------
    StreamlineError
        If neither construction gives one.

    Examples
    --------
    >>> h = hadamard(576)
    >>> bool((h @ h.T - torch.eye(576)).abs().max() < 1e-12)
    True
    """
    size = order
    while size > 0:
        found = _paley(size)
        if found is not None:
            while len(found) < order:
                found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
            return found / order**0.5
        if size % 2:
            break
        size //= 2
    raise StreamlineError(
        f"No Hadamard matrix of order {order} is known here: it is neither 1 nor q + 1 or 2(q + 1) for a prime q of "
        "the right kind, times a power of two. Take a kind that needs none, such as linear."
    )


def _paley(size: int) -> Tensor | None:
    if size in (1, 2):
        return torch.tensor([[1.0]] if size == 1 else [[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size - 1):
        inner = torch.zeros(size, size, dtype=torch.float64)
        inner[0, 1:], inner[1:, 0], inner[1:, 1:] = 1.0, -1.0, _residues(size - 1)
        return inner + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if size % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):
        inner = torch.zeros(half, half, dtype=torch.float64)
        inner[0, 1:], inner[1:, 0], inner[1:, 1:] = 1.0, 1.0, _residues(half - 1)
        signs, corner = (torch.tensor(m, dtype=torch.float64) for m in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
        return torch.kron(inner, signs) + torch.kron(torch.eye(half, dtype=torch.float64), corner)
    return None


def _residues(prime: int) -> Tensor:
    """Jacobsthal's matrix: of two places' difference, whether it is a square (1) or not (−1), modulo a prime."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    places = torch.arange(prime)
    return character[(places[:, None] - places) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
