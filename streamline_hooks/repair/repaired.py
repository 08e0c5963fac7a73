"""What was fitted for a window, and how that is done for what is folded into weights that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.branches import Branch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.repair.branch_linear import BranchLinear, fit_branch_linear
from streamline_hooks.repair.folded import measure_fold_moments, solve_fold
from streamline_hooks.repair.scaled import fit_scale
from streamline_hooks.repair.stand_in import StandIn
from streamline_hooks.stack import BlockStack
from streamline_hooks.statistics import WindowMoments

Batches = Sequence[Batch | Tensor]


@dataclass(frozen=True)
class Repair:
    """What was fitted for one window.

    Attributes
    ----------
    window : range
    stand_in : StandIn
        What stands in its place; None for plain removal.
    removal_error, repaired_error : float
        Mean relative squared error of the state after the window on held-out sequences, of plain removal and of the
        stand-in as it was fitted without them, in the model that the windows before it were taken out of. (A factor is
        measured on all sequences, and so are the errors with it.)
    ridge : float or None
        Chosen for it, in units of the mean eigenvalue of the moments; None where nothing was solved for.
    """

    window: range
    stand_in: StandIn
    removal_error: float
    repaired_error: float
    ridge: float | None


def fit_folded(
    stack: BlockStack,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Fit the maps that are folded into the blocks before windows, in as few passes as those allow that cannot be."""
    try:
        sums = [
            measure_fold_moments(stack.model, batches, windows, stack=stack.path, probe=probe, what=part + what)
            for batches, part in ((fit, "fit"), (held_out, "hold out"))
        ]
    except UnsupportedSurgery as error:  # before anything long was run
        if len(windows) == 1:
            return [error]
        half = len(windows) // 2
        parts = (windows[:half], windows[half:])
        return [one for part in parts for one in fit_folded(stack, part, fit, held_out, probe, what)]
    return [_folded(window, *pair) for window, pair in zip(windows, zip(*sums, strict=True), strict=True)]


def _folded(window: range, fit: WindowMoments, held_out: WindowMoments) -> Repair | UnsupportedSurgery:
    if not fit.xx.any():
        return UnsupportedSurgery(
            "Nothing can be folded into the block before this window: its MLP adds nothing. Choose another window or "
            "kind.",
            "fold",
        )
    one = solve_fold(window, fit, held_out)
    return Repair(window, one, one.removal_error, one.held_out_error, one.ridge)


def fit_branches(
    stack: BlockStack,
    branches: Sequence[tuple[int, Branch]],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
) -> dict[tuple[int, Branch], BranchLinear | UnsupportedSurgery]:
    """Fit linear maps in the place of branches on the model as it is, or say why there can be none."""
    try:
        options = {"stack": stack.path, "probe": probe}
        found = fit_branch_linear(stack.model, branches, fit, held_out, **options)  # type: ignore[arg-type]
    except UnsupportedSurgery as error:  # before anything long was run
        if len(branches) == 1:
            return {branches[0]: error}
        half = len(branches) // 2
        parts = (branches[:half], branches[half:])
        return {k: v for part in parts for k, v in fit_branches(stack, part, fit, held_out, probe).items()}
    return dict(zip(branches, found, strict=True))


def fit_scaled(
    stack: BlockStack,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Measure the factors for windows, each in a pass over all sequences."""
    found = [fit_scale(stack.model, window, [*fit, *held_out], stack=stack.path) for window in windows]
    return [Repair(one.window, one, one.removal_error, one.scaled_error, None) for one in found]
