"""Ghosted Layers: the map of least squares onto the gap at the boundary (Yun et al., arXiv 2605.15491).

In their code (daniel-eai/ghosted_layers_official_repository, lib/recovery.py) the target is the difference y − x of
the states that leave and enter the window in the original, every token weighs the same, and a ridge of 1e-6 is added to
the sums as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.repair.published.measured import measured
from streamline_hooks.repair.repaired import Batches, Repair
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.stack import BlockStack
from streamline_hooks.statistics import WindowMoments, measure_moments

RIDGE = 1e-6


def fit_ghosted(
    stack: BlockStack,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Fit the maps of windows to all sequences, in passes that end after the last of them."""
    parts = [
        measure_moments(stack.model, batches, windows, stack=stack.path, weighted=False, what=f"fit{what}")
        for batches in (fit, held_out)
    ]
    made = []
    for window, moments, others in zip(windows, *parts, strict=True):
        without = ghosted_map(moments)
        moments.merge(others)
        made.append((window, LinearReplacement.from_map(ghosted_map(moments)), without))
    return measured(stack, made, held_out, what)


def ghosted_map(moments: WindowMoments) -> Tensor:
    """M of shape (features, features) in x + xM: (Σ xxᵀ + 1e-6·I)⁻¹ Σ x(y − x)ᵀ, of sums without weights."""
    identity = torch.eye(len(moments.xx), dtype=torch.float64, device=moments.xx.device)
    return torch.linalg.solve(moments.xx + RIDGE * identity, moments.xd)
