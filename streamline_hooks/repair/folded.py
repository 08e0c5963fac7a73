"""Maps and factors that replace a window and are folded into existing weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.branch_states import reading_branches
from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.layouts import by_token
from streamline_hooks.passes import recorded
from streamline_hooks.precision import widen
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.repair.closed_form import solve
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import WindowMoments
from streamline_hooks.surgery.fold import foldable
from streamline_hooks.surgery.splice import BEFORE, spliced


@dataclass(frozen=True)
class Folded:
    """Map T that replaces a window, folded into the MLP of block ``window.start - 1``: m becomes mT.

    T is float64, (features, features); the ridge penalises ‖T − I‖² in units of the mean eigenvalue of Σ w mᵀm. The
    errors are mean relative squared errors of the state after the window on held-out sequences, with T and with T = I.
    """

    window: range
    map: Tensor
    ridge: float
    held_out_error: float
    removal_error: float


def solve_fold(window: range, fit: WindowMoments, held_out: WindowMoments) -> Folded:
    """Solve for the T that minimises Σ w‖y − a − mT‖² + λ‖T − I‖², with w = 1/‖y‖² and λ chosen on held-out moments.

    a + m leaves the block before the window, m being the output of its MLP: only m passes a projection.
    """
    solution = solve(fit, held_out)
    identity = torch.eye(len(solution.map), dtype=torch.float64, device=solution.map.device)
    return Folded(window, identity + solution.map, solution.ridge, solution.held_out_error, solution.removal_error)


def measure_fold_moments(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
    weighted: bool = True,
    what: str = "moments",
) -> list[WindowMoments]:
    """Sum the moments of m and y − a for several windows in one pass that ends after the last of them.

    Raises UnsupportedSurgery if a window has no block before it that can be folded into.
    """
    found = find_stack(model, stack)
    for window in windows:
        if window.start == 0:
            raise UnsupportedSurgery(
                f"Nothing can be folded for blocks 0 to {window.stop - 1}: no block stands before them. Choose another "
                "window or kind."
            )
    before = sorted({window.start - 1 for window in windows})
    folding = foldable(found, before, "mlp", probe)
    for k, branches in folding.items():
        if spliced(found[k + 1], BEFORE):
            raise UnsupportedSurgery(
                f"Nothing can be folded into block {k}: behind it stands what an earlier surgery put there, which "
                "would run on what was folded. Choose another window or kind.",
                "fold",
            )
        if branches.first == "mlp":
            raise UnsupportedSurgery(
                f"Nothing can be folded into block {k}: its attention works on what its MLP has added, so that the "
                "state that leaves it does not follow a map of that. Choose another window or kind.",
                "fold",
            )
    record = HiddenStateRecorder(model, sorted({w.stop - 1 for w in windows}), inputs=False, stop=True, stack=stack)
    passed: dict[int, tuple[Tensor, Tensor]] = {}
    attention: dict[int, Tensor] = {}

    def receive(k: int, branch: Branch, entering: Tensor, leaving: Tensor) -> None:
        if branch == "attention":
            attention[k] = leaving.clone()
            return
        wide = torch.promote_types(entering.dtype, torch.float32)  # where the difference of narrower ones is exact
        added = leaving.to(wide) - entering.to(wide)
        passed[k] = attention.pop(k), added

    moments: list[WindowMoments] = []
    cost = f"{what}: {len(windows)} windows, {max(w.stop for w in windows)} of {len(found)} blocks"
    with (
        reading_branches({k: found[k] for k in before}, folding, receive),
        recorded(model, batches, record, cost) as runs,
    ):
        for _, mask, _ in runs:
            moments = moments or [WindowMoments(passed[before[0]][0].shape[-1], weighted) for _ in windows]
            for window, sums in zip(windows, moments, strict=True):
                a, m = passed[window.start - 1]
                y = record.outputs[window.stop - 1][0]
                sums.update(m, y.to(m.dtype) - a.to(m.dtype), mask, relative_to=y)
            passed.clear()
    return moments


@dataclass(frozen=True)
class Scaled:
    """Factor α for the state after the cut that replaces a window without new parameters.

    The errors are mean relative squared errors of the state after the window on the measured sequences, with and
    without α; nothing minimises the first, which may be the larger.
    """

    window: range
    factor: float
    scaled_error: float
    removal_error: float


class MagnitudeGap:
    """Ratio of the magnitudes of the states leaving and entering a window (Prune&Comp).

    For each sequence and feature it is Σ|yᵢ|/Σ|xᵢ| over tokens; the factor is the mean over features and sequences.
    """

    def __init__(self) -> None:
        self.sequences, self.tokens = 0, 0
        self._ratios = 0.0
        self._xx = self._xy = 0.0  # relative to ‖y‖², summed over tokens

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        """Add one batch: states of shape (batch, tokens, features), and the mask of real tokens (batch, tokens)."""
        for x, y, real in zip(entering, leaving, mask.to(entering.device).bool(), strict=True):
            if not real.any():
                continue
            x, y = widen(x[real]), widen(y[real])
            before, after = x.abs().sum(dim=0), y.abs().sum(dim=0)
            if not (before > 0).all():
                raise StreamlineError(
                    f"Feature {int((before == 0).nonzero()[0])} is zero in every token of a sequence that enters the "
                    "window, so that nothing can be said of how it grows. Use another kind."
                )
            self._ratios += float((after / before).mean())
            norm = y.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            self._xx += float((x / norm).square().sum())
            self._xy += float((x / norm * (y / norm)).sum())
            self.sequences += 1
            self.tokens += len(x)

    @property
    def factor(self) -> float:
        """Return α."""
        if not self.sequences:
            raise StreamlineError(
                "There is no token to measure the magnitude on. Expected a batch with real tokens. Pass one."
            )
        return self._ratios / self.sequences

    def error(self, factor: float) -> float:
        """Return the mean of ‖y − αx‖²/‖y‖²; α = 1 is plain removal."""
        return 1 + (factor * factor * self._xx - 2 * factor * self._xy) / self.tokens


def fit_scale(
    model: nn.Module, window: range, batches: Sequence[Batch | Tensor], *, stack: str | None = None
) -> Scaled:
    """Measure the factor of a window in one pass that ends after it."""
    record = HiddenStateRecorder(model, sorted({window.start, window.stop - 1}), stop=True, stack=stack)
    first, last = record.stack[window.start], record.stack[window.stop - 1]
    gap = MagnitudeGap()
    cost = f"magnitude: {window.stop} of {len(record.stack)} blocks"
    with recorded(model, batches, record, cost) as passed:
        for _, mask, _ in passed:
            entering = by_token(record.inputs[window.start][0], first)
            gap.update(entering, by_token(record.outputs[window.stop - 1][0], last), mask)
    return Scaled(window, gap.factor, gap.error(gap.factor), gap.error(1.0))
