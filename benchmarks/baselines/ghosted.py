"""Ghosted Layers: the map of least squares onto the gap at the boundary (Yun et al., arXiv 2605.15491).

In their code (daniel-eai/ghosted_layers_official_repository, lib/recovery.py) the target is the difference y − x of
the states that leave and enter the window in the original, every token weighs the same, and a ridge of 1e-6 is added to
the sums as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.measured import measured
from streamline_hooks import (
    BlockStack,
    CompressionConfig,
    LinearReplacement,
    Preset,
    ReplacementConfig,
    UnsupportedSurgery,
    WindowMoments,
    measure_moments,
    register_replacement,
)
from streamline_hooks.batch import Batch
from streamline_hooks.repair import Batches, Repair, StandIn, features_of

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


@register_replacement
@dataclass(frozen=True)
class GhostedConfig(ReplacementConfig):
    """Fit a linear map as `fit_ghosted` does."""

    kind = "ghosted"
    fit = staticmethod(fit_ghosted)

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return LinearReplacement(features_of(stack))


PRESET = Preset(
    "ghosted",
    CompressionConfig(repair=GhostedConfig()),
    "Ghosted Layers, arXiv 2605.15491; daniel-eai/ghosted_layers_official_repository, lib/recovery.py.",
)
