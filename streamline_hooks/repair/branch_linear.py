"""Least-squares linear maps that replace a single attention or MLP of a block.

Neural Block Linearization (Erdogan et al., arXiv 2505.21077) maps the state before the norm of an attention to its
output. This implementation minimizes the error relative to the state after the branch, chooses a ridge on held-out
sequences, and fits no bias.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import Batch, Batches, StreamlineError, UnsupportedSurgery
from streamline_hooks.modeling import (
    BlockStack,
    Branch,
    Branches,
    StateSource,
    branches_of,
    closing_generator,
    reading_branches,
    require_branches_readable,
)
from streamline_hooks.recording import HiddenStateRecorder
from streamline_hooks.repair.least_squares import solve_least_squares
from streamline_hooks.repair.placement import fit_possible
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.statistics import WindowMoments, moments_by_window
from streamline_hooks.surgery import AFTER, BEFORE, LayerSurgeon, as_state_source, spliced


@dataclass(frozen=True)
class BranchLinear:
    """Linear map W that replaces one branch of a block, h ↦ h + hW.

    Attributes
    ----------
    block : int
        Index of the block.
    branch : str
        ``"attention"`` or ``"mlp"``.
    is_first : bool
        Whether the branch is the first of the block. Its map runs before the block, that of the second branch after it.
    map : torch.Tensor
        W of shape (features, features), float64.
    ridge : float
        The chosen penalty, in units of the mean eigenvalue of Σ w hᵀh.
    held_out_error, removal_error : float
        Mean relative squared error of the state after the branch on the held-out sequences, with the map and with
        W = 0.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.repair import fit_branch_linear
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.arange(3, 63).view(6, 10)]
    >>> (branch_map,) = fit_branch_linear(tiny_model("llama"), [(2, "mlp")], batches, batches)
    >>> branch_map.is_first, branch_map.map.shape
    (False, torch.Size([32, 32]))
    """

    block: int
    branch: Branch
    is_first: bool
    map: Tensor
    ridge: float
    held_out_error: float
    removal_error: float


def fit_branch_linear(
    model: nn.Module | StateSource,
    branches: Sequence[tuple[int, Branch]],
    fit: Sequence[Batch | Tensor],
    held_out: Sequence[Batch | Tensor],
    *,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
) -> list[BranchLinear]:
    """Fit a least-squares linear map for each attention or MLP in one pass over each part of the data.

    Neural Block Linearization (arXiv 2505.21077) with a relative error and a ridge.

    Parameters
    ----------
    model : torch.nn.Module
    branches : sequence of (int, str)
        Block index and ``"attention"`` or ``"mlp"``.
    fit, held_out : sequence of mapping or torch.Tensor
        Batches to fit the maps on, and batches of other documents to choose the ridge on.
    stack : str, optional
        Path of the block stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        A batch without padding. Required only for models that cannot be probed with random tokens.

    Returns
    -------
    list of BranchLinear
        One map per branch, for `replace_branches`.

    Raises
    ------
    UnsupportedSurgery
        If a block does not have two separate branches in series, or an inserted module follows the branch.
    StreamlineError
        If a block does not exist or `branches` is empty.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model, batches = tiny_model("llama"), [torch.arange(3, 63).view(6, 10)]
    >>> (branch_map,) = fit_branch_linear(model, [(2, "attention")], batches, batches)
    >>> branch_map.is_first, branch_map.held_out_error < branch_map.removal_error
    (True, True)
    """
    source = as_state_source(model, stack)
    record = HiddenStateRecorder(source.model, [k for k, _ in branches], stack=source.stack.path)  # validates indices
    branch_keys = [(k % len(record.stack), branch) for k, branch in branches]
    results = _branches_in_series(source.stack, branch_keys, probe)
    for result in results.values():
        if isinstance(result, UnsupportedSurgery):
            raise result
    in_series = {key: result for key, result in results.items() if isinstance(result, Branches)}
    branch_maps: dict[int, BranchLinear] = {}
    parts = [("fit branches", fit), ("held-out moments of branches", held_out)]
    with _branch_moments(source, parts, branch_keys, in_series) as branch_moments:
        for number, (fit_moments, held_out_moments) in branch_moments:
            k, branch = branch_keys[number]
            solution = solve_least_squares(fit_moments, held_out_moments)
            branch_maps[number] = BranchLinear(
                k,
                branch,
                in_series[k, branch].first == branch,
                solution.map,
                solution.ridge,
                solution.held_out_error,
                solution.removal_error,
            )
    return [branch_maps[number] for number in range(len(branch_keys))]


def fit_branches(
    source: StateSource,
    branches: Sequence[tuple[int, Branch]],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
) -> dict[tuple[int, Branch], BranchLinear | UnsupportedSurgery]:
    """Fit a linear map for each branch; the value is an UnsupportedSurgery where a branch cannot be replaced."""

    def fit_part(part: Sequence[tuple[int, Branch]]) -> list[BranchLinear]:
        return fit_branch_linear(source, part, fit, held_out, probe=probe)

    if source.in_memory:
        return dict(zip(branches, fit_possible(branches, fit_part), strict=True))
    in_series = _branches_in_series(source.stack, branches, probe)
    results: dict[tuple[int, Branch], BranchLinear | UnsupportedSurgery] = {
        key: error for key, error in in_series.items() if isinstance(error, UnsupportedSurgery)
    }
    remaining = [key for key in branches if key not in results]
    try:  # in one pass: a second pass for some of the branches would read the blocks again
        results.update(zip(remaining, fit_part(remaining) if remaining else [], strict=True))
    except UnsupportedSurgery as error:
        results.update(dict.fromkeys(remaining, error))
    return results


def replace_branches(surgeon: LayerSurgeon, fitted: Sequence[BranchLinear]) -> list[nn.Module]:
    """Zero branches in an open surgeon and insert their linear maps.

    Pass all branches in one call, before inserting other modules next to these blocks. The map of a block's first
    branch runs before the block, the map of its second branch directly after the block.

    Parameters
    ----------
    surgeon : LayerSurgeon
    fitted : sequence of BranchLinear
        The result of `fit_branch_linear`.

    Returns
    -------
    list of torch.nn.Module
        The inserted `LinearReplacement` of each branch, in the order of `fitted`.

    Raises
    ------
    StreamlineError
        If another module is already inserted after one of the blocks, or a block is already removed.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.testing import tiny_model
    >>> model, batches = tiny_model("llama"), [torch.arange(3, 63).view(6, 10)]
    >>> branch_maps = fit_branch_linear(model, [(2, "attention")], batches, batches)
    >>> with LayerSurgeon(model) as surgeon:
    ...     [type(module).__name__ for module in replace_branches(surgeon, branch_maps)]
    ['LinearReplacement']
    """
    for branch_map in fitted:
        if not branch_map.is_first:
            _require_nothing_inserted(surgeon, branch_map)
    modules: dict[int, nn.Module] = {}
    for position, branch_map in sorted(enumerate(fitted), key=lambda pair: (pair[1].block, not pair[1].is_first)):
        surgeon.zero_branch(branch_map.block, branch_map.branch)
        modules[position] = surgeon.insert(
            branch_map.block + (not branch_map.is_first), LinearReplacement.from_map(branch_map.map)
        )
    return [modules[position] for position in range(len(fitted))]


@closing_generator
def _branch_moments(
    source: StateSource,
    parts: Sequence[tuple[str, Batches]],
    branch_keys: Sequence[tuple[int, Branch]],
    in_series: Mapping[tuple[int, Branch], Branches],
) -> Generator[tuple[int, list[WindowMoments]], None, None]:
    """Sum the moments of the states before and after branches, and yield those of each branch once complete."""
    branch_states: dict[tuple[int, Branch], tuple[Tensor, Tensor]] = {}
    branches_by_block = {k: branches for (k, _), branches in in_series.items()}

    def receive(k: int, branch: Branch, before: Tensor, after: Tensor) -> None:
        if not source.in_memory:  # only the block that ran last is summed
            for key in [key for key in branch_states if key[0] != k]:
                del branch_states[key]
        if (k, branch) in in_series:
            branch_states[k, branch] = before.clone(), after.clone()

    def make(number: int, features: int) -> WindowMoments:
        return _BranchMoments(features, branch_states, branch_keys[number])

    require_branches_readable(source, branches_by_block)
    windows = [range(k, k + 1) for k, _ in branch_keys]
    with (
        reading_branches({k: source.stack[k] for k in branches_by_block}, branches_by_block, receive),
        moments_by_window(source, parts, windows, make=make, rerun=[1] * len(windows)) as summed,
    ):
        for number, sums in summed:
            yield number, [sums.pop(0) or WindowMoments(0) for _ in parts]


class _BranchMoments(WindowMoments):
    """Sum the moments of the states before and after a branch, as its hooks recorded them last."""

    def __init__(
        self, features: int, states: Mapping[tuple[int, Branch], tuple[Tensor, Tensor]], key: tuple[int, Branch]
    ) -> None:
        super().__init__(features)
        self._states, self._key = states, key

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor, **_: Any) -> None:
        """Add the batch of the last call of the block."""
        super().update(*self._states[self._key], mask)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the name of the branch, so that another branch of the block cannot continue them."""
        k, branch = self._key
        return {**super().state_dict(), "branch": f"{branch} of block {k}"}


def _branches_in_series(
    stack: BlockStack, branch_keys: Sequence[tuple[int, Branch]], probe: Batch | Tensor | None
) -> dict[tuple[int, Branch], Branches | UnsupportedSurgery]:
    """Find the branches of each block, or the error with the reason why no map can replace a branch."""
    branches_by_block = branches_of(stack, sorted({k for k, _ in branch_keys}), probe)
    results: dict[tuple[int, Branch], Branches | UnsupportedSurgery] = {}
    for k, branch in branch_keys:
        try:
            in_series = _in_series(k, branches_by_block[k])
            if in_series.first != branch:
                _require_nothing_behind(stack, k, branch)
            results[k, branch] = in_series
        except UnsupportedSurgery as error:
            results[k, branch] = error
    return results


def _in_series(k: int, branches: Branches | UnsupportedSurgery) -> Branches:
    if isinstance(branches, UnsupportedSurgery):
        raise UnsupportedSurgery(
            f"Cannot replace a branch of block {k} by a linear map: {branches} Choose another block.", "branches"
        )
    if branches.first is None:
        raise UnsupportedSurgery(
            f"Cannot replace a branch of block {k} by a linear map: its attention and its MLP read the same state. "
            "A map of that state can run neither before nor after the block. Expected branches in series. Zero the "
            "branch with LayerSurgeon.zero_branch, or replace the whole block.",
            "parallel",
        )
    return branches


def _require_nothing_behind(stack: BlockStack, k: int, branch: Branch) -> None:
    """Raise if a module inserted by an earlier surgery follows the block, because it would run before the map."""
    inserted = spliced(stack[k + 1], BEFORE) if k + 1 < len(stack) else spliced(stack[k], AFTER)
    if inserted:
        raise UnsupportedSurgery(
            f"Cannot replace the {branch} of block {k} by a linear map: an earlier surgery inserted a "
            f"{type(inserted[0]).__name__} after the block, and the map would run after it. Zero the branch with "
            "LayerSurgeon.zero_branch, or choose another branch.",
            "spliced",
        )


def _require_nothing_inserted(surgeon: LayerSurgeon, branch_map: BranchLinear) -> None:
    """Raise if a module is already inserted after the block, because it would run before the map."""
    plan, next_block = surgeon.plan, branch_map.block + 1
    slot = plan.old_to_new.get(branch_map.block)
    if slot is None:
        return  # `zero_branch` raises that the block is removed
    inserted = [
        s.module for s in plan.splices if s.old_before == next_block and (s.replaces or (0, 0))[0] != next_block
    ]
    inserted += [s.module for s in plan.slots[slot + 1 : slot + 2] if s.source is None]
    if inserted:
        raise StreamlineError(
            f"A {inserted[0]} is already inserted after block {branch_map.block} and would run before the map that "
            f"replaces its {branch_map.branch}. Call replace_branches first, with all branches in one call."
        )
