"""The error that a published map leaves, which is not the one that it minimises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamline_hooks import BlockStack, UnsupportedSurgery, measure_moments
from streamline_hooks.repair import Batches, Repair


def measured(
    stack: BlockStack, made: Sequence[tuple[range, nn.Module, Tensor]], held_out: Batches, what: str
) -> list[Repair | UnsupportedSurgery]:
    """Hold maps h + hW against the original on held-out sequences.

    Parameters
    ----------
    stack : BlockStack
    made : sequence of (range, torch.nn.Module, torch.Tensor)
        Windows, what stands in their place, and the W that it would hold if it had been fitted without those sequences.
    held_out : sequence of mapping or torch.Tensor
    what : str
        What the bar says, after "hold out".
    """
    windows = [window for window, _, _ in made]
    moments = measure_moments(stack.model, held_out, windows, stack=stack.path, what=f"hold out{what}")
    repairs: list[Repair | UnsupportedSurgery] = []
    for (window, module, map_), sums in zip(made, moments, strict=True):
        repairs.append(Repair(window, module, sums.error(torch.zeros_like(map_)), sums.error(map_), None))
    return repairs
