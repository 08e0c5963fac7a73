"""The precision of long sums, and that in which a model computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamline_hooks.batch import device_of


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 is computed: the device, or the CPU if it has no float64 (Apple's MPS).

    Examples
    --------
    >>> float64_device(torch.device("mps")), float64_device(torch.device("cuda:1"))
    (device(type='cpu'), device(type='cuda', index=1))
    """
    return torch.device("cpu") if device.type == "mps" else device


def widen(states: Tensor) -> Tensor:
    """Return the states in float64, on `float64_device`."""
    return states.to(float64_device(states.device)).to(torch.float64)


def widest(device: torch.device) -> torch.dtype:
    """Return the precision of sums that stay on a device: float64 if it has that."""
    return torch.float64 if float64_device(device) == device else torch.float32


def speaks_alike(model: nn.Module, got: Tensor, expected: Tensor) -> bool:
    """Whether logits that came two ways through a model are the same but for its rounding.

    That is so of each row as a whole: of 50,000 numbers in half precision some are always far from what they would be.
    What all of a row are larger or smaller by says nothing.

    Parameters
    ----------
    model : torch.nn.Module
        In half precision, by its weights or under autocast, a twentieth of a number may be rounding.
    got, expected : torch.Tensor
        Of shape (..., vocabulary).

    Examples
    --------
    >>> logits = torch.linspace(-4.0, 4.0, 25)[None]
    >>> speaks_alike(nn.Linear(1, 1), logits + 1.0, logits), speaks_alike(nn.Linear(1, 1), logits.roll(1), logits)
    (True, False)
    """
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    rounding = 5e-2 if half or torch.is_autocast_enabled(device_of(model).type) else 1e-3
    apart, spread = (widen(one).std(dim=-1) for one in (got - expected, expected))
    return bool((apart <= rounding * spread).all())
