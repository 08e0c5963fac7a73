"""The map that is folded into the block before a window, in closed form from what that block's MLP adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.branch_states import reading_branches
from streamline_hooks.branches import Branch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.passes import recorded
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.repair.closed_form import solve
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import WindowMoments
from streamline_hooks.surgery.fold import foldable
from streamline_hooks.surgery.splice import BEFORE, spliced


@dataclass(frozen=True)
class Folded:
    """A map that stands in a window's place without a new parameter.

    Attributes
    ----------
    window : range
        The blocks in whose place it stands. It is folded into the MLP of block ``window.start - 1``.
    map : torch.Tensor
        T of shape (features, features), float64: the block adds mT in the place of m.
    ridge : float
        The penalty on ‖T − I‖², in units of the mean eigenvalue of Σ w mᵀm.
    held_out_error : float
        Mean relative squared error of the state after the window on held-out sequences, of the map that was fitted
        without them.
    removal_error : float
        The same for plain removal, T = I.
    """

    window: range
    map: Tensor
    ridge: float
    held_out_error: float
    removal_error: float


def solve_fold(window: range, fit: WindowMoments, held_out: WindowMoments) -> Folded:
    """Solve for the map that, folded into the block before a window, comes nearest to what the window does.

    The state that leaves the block before the window is a + m, with m what its MLP adds, of which only m passes
    through projections. So the state after the window is to be a + mT, and T minimises Σ w‖y − a − mT‖² + λ‖T − I‖²
    with w = 1/‖y‖², λ being chosen on held-out sequences. (A map that was fitted on the whole state is another one:
    it would have to be multiplied onto a as well.)

    Parameters
    ----------
    window : range
    fit, held_out : WindowMoments
        Sums of `measure_fold_moments` to fit on, and to choose λ by; of different documents.

    Returns
    -------
    Folded
        To be applied by ``surgeon.fold(window.start - 1, folded.map)`` and ``surgeon.remove(window)``. On the
        sequences that it was fitted on, in the error that was minimised, never above plain removal.
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
    """Sum the moments that folding needs, for several windows in one pass that ends after the last of them.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        What the model's forward takes.
    windows : sequence of range
    stack : str, optional
        Path of the stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        What to look for branches on in a model that cannot be probed otherwise, without padding.
    weighted : bool
        See `WindowMoments`.
    what : str
        What the bar says, before what it costs.

    Returns
    -------
    list of WindowMoments
        One a window: of m and y − a, relative to y, so that its map is T − I.

    Raises
    ------
    UnsupportedSurgery
        If no block stands before a window, nothing can be folded into that block (see `LayerSurgeon.fold`), or its
        attention works on what its MLP has added.
    StreamlineError
        If a state is not finite.
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
