"""The precision of long sums."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(states: Tensor) -> Tensor:
    """The states in float64, on their own device, or on the CPU where that has no float64 (Apple's MPS)."""
    return states.cpu().to(torch.float64) if states.device.type == "mps" else states.to(torch.float64)


def widest(device: torch.device) -> torch.dtype:
    """The precision of sums that stay on a device: float64, where it has that."""
    return torch.float32 if device.type == "mps" else torch.float64
