"""Ghosted Layers: a least-squares map onto the difference of the states at the window (Yun et al., arXiv 2605.15491).

In the published code (daniel-eai/ghosted_layers_official_repository, lib/recovery.py) the target is the difference
y − x between the output and the input of the window in the original model. All tokens have the same weight, and a ridge
of 1e-6 is added to the unnormalized sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.measured import measured
from streamline_hooks import CompressionConfig, UnsupportedSurgery
from streamline_hooks.core import Batches
from streamline_hooks.modeling import BlockStack, StateSource
from streamline_hooks.pipeline import Preset
from streamline_hooks.repair import Repair, ReplacementConfig, WindowReplacement, hidden_size_of, register_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.statistics import WindowMoments, measure_moments

RIDGE = 1e-6


def fit_ghosted(
    source: StateSource,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Mapping[str, Tensor] | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Fit the maps of all windows, in two passes that end after the last window."""
    stack = source.stack
    parts = [
        measure_moments(stack.model, batches, windows, stack=stack.path, weighted=False, desc=f"fit{what}")
        for batches in (fit, held_out)
    ]
    replacements = []
    for window, moments, held_out_moments in zip(windows, *parts, strict=True):
        map_of_fit_part = ghosted_map(moments)
        moments.merge(held_out_moments)
        replacements.append((window, LinearReplacement.from_map(ghosted_map(moments)), map_of_fit_part))
    return measured(stack, replacements, held_out, what)


def ghosted_map(moments: WindowMoments) -> Tensor:
    """Return M in x + xM, (Σ xxᵀ + 1e-6·I)⁻¹ Σ x(y − x)ᵀ, with equal token weights."""
    identity = torch.eye(len(moments.xx), dtype=torch.float64, device=moments.xx.device)
    return torch.linalg.solve(moments.xx + RIDGE * identity, moments.xd)


@register_replacement
@dataclass(frozen=True)
class GhostedConfig(ReplacementConfig):
    """Fit a linear map as `fit_ghosted` does."""

    kind = "ghosted"
    fit = staticmethod(fit_ghosted)

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return LinearReplacement(hidden_size_of(stack))


PRESET = Preset(
    "ghosted",
    CompressionConfig(repair=GhostedConfig()),
    "Ghosted Layers, arXiv 2605.15491; daniel-eai/ghosted_layers_official_repository, lib/recovery.py.",
)
