"""ReplaceMe: a least-squares map folded into the MLP before the window (Shopkhoev et al., arXiv 2505.02819).

In the paper (eq. 1 to 6) and its code (mts-ai/ReplaceMe, lstsq.py) the map is T = (MᵀM)⁻¹Mᵀ(Y − A), where M is the
output of the MLP before the window, A the residual stream that it is added to, and Y the state after the window. All
tokens have the same weight, and there is no ridge. The published code includes padding in its sums; this one does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from streamline_hooks import CompressionConfig, UnsupportedSurgery
from streamline_hooks.core import Batches
from streamline_hooks.modeling import BlockStack, StateSource
from streamline_hooks.pipeline import Preset
from streamline_hooks.repair import (
    FoldedMap,
    Repair,
    ReplacementConfig,
    WindowReplacement,
    measure_fold_moments,
    register_replacement,
)
from streamline_hooks.statistics import WindowMoments


def fit_replace_me(
    source: StateSource,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Mapping[str, Tensor] | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Fit the map of each window in separate passes; return the refusal if it cannot be folded."""
    stack = source.stack
    return [_fit(stack, window, fit, held_out, probe, what) for window in windows]


def _fit(
    stack: BlockStack,
    window: range,
    fit: Batches,
    held_out: Batches,
    probe: Mapping[str, Tensor] | Tensor | None,
    what: str,
) -> Repair | UnsupportedSurgery:
    measure = partial(measure_fold_moments, stack.model, windows=[window], stack=stack.path, probe=probe)
    try:
        (plain,), (others,) = (measure(batches, weighted=False, desc=f"fit{what}") for batches in (fit, held_out))
        (relative,) = measure(held_out, desc=f"held-out moments{what}")
    except UnsupportedSurgery as error:
        return error
    without = replace_me_map(plain)
    plain.merge(others)
    change = replace_me_map(plain)
    errors = relative.error(torch.zeros_like(without)), relative.error(without)
    identity = torch.eye(len(change), dtype=torch.float64, device=change.device)
    return Repair(window, FoldedMap(window, identity + change, 0.0, errors[1], errors[0]), *errors, 0.0)


def replace_me_map(moments: WindowMoments) -> Tensor:
    """Return T − I, the minimum-norm solution, from the unweighted sums of m and y − a − m."""
    sums = moments.xx.cpu(), moments.xd.cpu()  # this driver is only available on the CPU
    solution: Tensor = torch.linalg.lstsq(*sums, driver="gelsd").solution
    return solution.to(moments.xx.device)


@register_replacement
@dataclass(frozen=True)
class ReplaceMeConfig(ReplacementConfig):
    """Fold a linear map like ReplaceMe; see `fit_replace_me`."""

    kind = "replaceme"
    fit = staticmethod(fit_replace_me)

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return None


PRESET = Preset(
    "replaceme",
    CompressionConfig(repair=ReplaceMeConfig()),
    "ReplaceMe, arXiv 2505.02819, eq. 1 to 6; mts-ai/ReplaceMe, lstsq.py, which includes padding in its sums.",
)
