"""ReplaceMe: a map of least squares folded into the MLP before the window (Shopkhoev et al., arXiv 2505.02819).

In the paper (eq. 1 to 6) and its code (mts-ai/ReplaceMe, lstsq.py) the map is T = (MᵀM)⁻¹Mᵀ(Y − A), with M what the
MLP before the window adds, A the residual stream that it is added to, and Y the state after the window. Every token
weighs the same, and there is no ridge. Its code sums over padding too; here padding never counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from streamline_hooks import (
    BlockStack,
    CompressionConfig,
    Preset,
    ReplacementConfig,
    UnsupportedSurgery,
    WindowMoments,
    register_replacement,
)
from streamline_hooks.batch import Batch
from streamline_hooks.repair import Batches, Folded, Repair, StandIn, measure_fold_moments


def fit_replace_me(
    stack: BlockStack,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Fit the maps of windows to all sequences, each in passes of its own; why not, where nothing can be folded."""
    return [_fit(stack, window, fit, held_out, probe, what) for window in windows]


def _fit(
    stack: BlockStack, window: range, fit: Batches, held_out: Batches, probe: Batch | Tensor | None, what: str
) -> Repair | UnsupportedSurgery:
    measure = partial(measure_fold_moments, stack.model, windows=[window], stack=stack.path, probe=probe)
    try:
        (plain,), (others,) = (measure(batches, weighted=False, what=f"fit{what}") for batches in (fit, held_out))
        (relative,) = measure(held_out, what=f"hold out{what}")
    except UnsupportedSurgery as error:
        return error
    without = replace_me_map(plain)
    plain.merge(others)
    change = replace_me_map(plain)
    errors = relative.error(torch.zeros_like(without)), relative.error(without)
    identity = torch.eye(len(change), dtype=torch.float64, device=change.device)
    return Repair(window, Folded(window, identity + change, 0.0, errors[1], errors[0]), *errors, 0.0)


def replace_me_map(moments: WindowMoments) -> Tensor:
    """T − I, from the sums without weights of m and of y − a − m; the shortest solution where there are several."""
    sums = moments.xx.cpu(), moments.xd.cpu()  # this driver is for processors alone
    solution: Tensor = torch.linalg.lstsq(*sums, driver="gelsd").solution
    return solution.to(moments.xx.device)


@register_replacement
@dataclass(frozen=True)
class ReplaceMeConfig(ReplacementConfig):
    """Fold a linear map as ReplaceMe does, see `fit_replace_me`."""

    kind = "replaceme"
    fit = staticmethod(fit_replace_me)

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return None


PRESET = Preset(
    "replaceme",
    CompressionConfig(repair=ReplaceMeConfig()),
    "ReplaceMe, arXiv 2505.02819, eq. 1 to 6; mts-ai/ReplaceMe, lstsq.py, which includes padding in its sums.",
)
