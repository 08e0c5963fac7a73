"""The inner products of a token's states, from which cosines, angles, norms and differences all follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError
from streamline_hooks.precision import float64_device

# What one product works on: on a CPU it should stay in the cache, and be large enough to share among threads.
BYTES_AT_ONCE = {"cpu": 2**24}
_ON_AN_ACCELERATOR = 2**28


def token_grams(states: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """The inner products of every two states of each chosen token.

    They are float64, and products of float64 numbers: an angle near 0 is about √(2(1 − cosine)), so that a cosine
    which is off by float32's 1e-7 is an angle that is off by 4e-4 (1.4e-4 of π).

    Parameters
    ----------
    states : sequence of torch.Tensor
        One a place, each of shape (tokens, features).
    chosen : torch.Tensor
        The numbers of the tokens, rising, of shape (chosen,), on the CPU.

    Returns
    -------
    torch.Tensor
        Of shape (chosen, places, places), float64, on the device of the first state (on the CPU for MPS, which has no
        float64).

    Raises
    ------
    StreamlineError
        If the states are not of one shape.

    Examples
    --------
    >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    >>> token_grams([a, b], torch.tensor([0])).tolist()
    [[[25.0, 4.0], [4.0, 1.0]]]
    """
    first, places = states[0], len(states)
    odd = next((k for k, state in enumerate(states) if state.shape != first.shape), None)
    if odd is not None:
        raise StreamlineError(
            f"The states at place {odd} have the shape {tuple(states[odd].shape)}, those at place 0 "
            f"{tuple(first.shape)} (tokens, features); states of different shapes cannot be compared."
        )
    device = float64_device(first.device)
    limit = BYTES_AT_ONCE.get(device.type, _ON_AN_ACCELERATOR)
    size = max(1, min(len(chosen), limit // (8 * places * first.shape[1])))
    grams = torch.empty(len(chosen), places, places, dtype=torch.float64, device=device)
    gathered = torch.empty(size, places, first.shape[1], dtype=torch.float64, device=device)
    for start in range(0, len(chosen), size):
        part = run_or_index(chosen[start : start + size])
        filled = gathered[: min(size, len(chosen) - start)]
        for k, state in enumerate(states):
            filled[:, k].copy_(state[part])
        torch.bmm(filled, filled.transpose(1, 2), out=grams[start : start + size])
    return grams


def run_or_index(rising: Tensor) -> slice | Tensor:
    """Rising numbers as a slice where they are consecutive, which copies nothing, and else as they are."""
    if len(rising) and int(rising[-1]) - int(rising[0]) == len(rising) - 1:
        return slice(int(rising[0]), int(rising[-1]) + 1)
    return rising
