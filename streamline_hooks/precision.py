"""Dtypes of long sums, and comparison of logits up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamline_hooks.batch import device_of


def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums: the given one, or the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def widen(states: Tensor) -> Tensor:
    """Return the states in float64, on `float64_device`."""
    return states.to(float64_device(states.device)).to(torch.float64)


def widest(device: torch.device) -> torch.dtype:
    """Return the precision of sums that stay on a device: float64 if it has that."""
    return torch.float64 if float64_device(device) == device else torch.float32


def speaks_alike(model: nn.Module, got: Tensor, expected: Tensor) -> bool:
    """Whether logits of shape (..., vocabulary) agree up to the rounding of the model's precision, row by row.

    The standard deviation of the difference is compared, so an offset of a whole row does not count. The share allowed
    is 0.1 %, or 5 % in half precision, by the weights or under autocast.
    """
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    rounding = 5e-2 if half or torch.is_autocast_enabled(device_of(model).type) else 1e-3
    apart, spread = (widen(one).std(dim=-1) for one in (got - expected, expected))
    return bool((apart <= rounding * spread).all())
