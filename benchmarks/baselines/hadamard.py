"""Hadamard matrices of the orders that occur as model widths."""

from __future__ import annotations

import torch
from torch import Tensor

from streamline_hooks import StreamlineError


def hadamard(order: int) -> Tensor:
    """Return a Hadamard matrix divided by the square root of its order, which is orthogonal.

    It is built by Sylvester's doubling from a matrix of Paley (Journal of Mathematics and Physics 12, 1933) of order
    q + 1 for a prime q ≡ 3 (mod 4), or 2·(q + 1) for a prime q ≡ 1 (mod 4).

    Parameters
    ----------
    order : int

    Returns
    -------
    torch.Tensor
        Matrix of shape (order, order), float64.

    Raises
    ------
    StreamlineError
        If the constructions do not cover this order.

    Examples
    --------
    >>> h = hadamard(576)
    >>> bool((h @ h.T - torch.eye(576)).abs().max() < 1e-12)
    True
    """
    size = order
    while size > 0:
        matrix = _paley(size)
        if matrix is not None:
            while len(matrix) < order:
                matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
            return matrix / order**0.5
        if size % 2:
            break
        size //= 2
    raise StreamlineError(
        f"No Hadamard matrix of order {order} can be built. Expected a power of two times 1, q + 1 or 2(q + 1) for a "
        "suitable prime q. Choose another replacement, such as linear."
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
    """Return Jacobsthal's matrix: 1 where the index difference is a square modulo the prime, −1 elsewhere."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    places = torch.arange(prime)
    return character[(places[:, None] - places) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
