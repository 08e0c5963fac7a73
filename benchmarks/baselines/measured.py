"""Measure the error of published maps, which minimize other objectives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamline_hooks import UnsupportedSurgery
from streamline_hooks.core import Batches
from streamline_hooks.modeling import BlockStack
from streamline_hooks.repair import Repair
from streamline_hooks.statistics import measure_moments


def measured(
    stack: BlockStack, replacements: Sequence[tuple[range, nn.Module, Tensor]], held_out: Batches, what: str
) -> list[Repair | UnsupportedSurgery]:
    """Measure the errors of maps h + hW on held-out sequences.

    Parameters
    ----------
    stack : BlockStack
    made : sequence of (range, torch.nn.Module, torch.Tensor)
        Windows, their replacement modules, and W as fitted without the held-out sequences.
    held_out : sequence of mapping or torch.Tensor
    what : str
        Text of the progress bar after "held-out moments".
    """
    windows = [window for window, _, _ in replacements]
    moments = measure_moments(stack.model, held_out, windows, stack=stack.path, desc=f"held-out moments{what}")
    repairs: list[Repair | UnsupportedSurgery] = []
    for (window, module, fitted_map), sums in zip(replacements, moments, strict=True):
        repairs.append(Repair(window, module, sums.error(torch.zeros_like(fitted_map)), sums.error(fitted_map), None))
    return repairs
