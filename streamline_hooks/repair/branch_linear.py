"""Least-squares linear maps in the place of single attentions and MLPs.

Neural Block Linearization (Erdogan et al., arXiv 2505.21077) maps the state before the norm of an attention to its
output. Here the error is relative to the state after the branch, a ridge is chosen on held-out sequences, and there is
no constant. The map may also be of the normalised state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamline_hooks.batch import Batch
from streamline_hooks.branch_states import reading_branches
from streamline_hooks.branches import Branch, Branches, tolerance
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.passes import recorded
from streamline_hooks.precision import widen
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.repair.closed_form import solve
from streamline_hooks.repair.stand_in import Batches, fit_possible
from streamline_hooks.replacements import LinearReplacement, NormedLinearReplacement
from streamline_hooks.stack import BlockStack
from streamline_hooks.statistics import WindowMoments
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.silence import branches_of
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced


@dataclass(frozen=True)
class BranchLinear:
    """Linear map W that replaces one branch of a block, h ↦ h + hW, or h + norm(h)W if it has a norm.

    `is_first` says whether the other branch follows, so that the map runs before the block. `map` is float64, of shape
    (features, features); `ridge` is in units of the mean eigenvalue of Σ w hᵀh; the errors are mean relative squared
    errors of the state after the branch on held-out sequences, with the map and with W = 0.
    """

    block: int
    branch: Branch
    is_first: bool
    map: Tensor
    ridge: float
    held_out_error: float
    removal_error: float
    norm: BranchNorm | None = None

    def module(self) -> LinearReplacement | NormedLinearReplacement:
        """Return the module that replaces the branch."""
        if self.norm is None:
            return LinearReplacement.from_map(self.map)
        return NormedLinearReplacement.from_map(self.map, self.norm.weight, self.norm.eps)


def fit_branch_linear(
    model: nn.Module,
    branches: Sequence[tuple[int, Branch]],
    fit: Sequence[Batch | Tensor],
    held_out: Sequence[Batch | Tensor],
    *,
    normed: bool = False,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
) -> list[BranchLinear]:
    """Fit a linear map for each branch (block, "attention" or "mlp") in one pass over each part of the text.

    The ridge is chosen on `held_out`. With `normed`, the map is of the state after the branch's RMS norm. Raises
    UnsupportedSurgery if a block has not two separate branches in series, or `normed` finds no RMS norm.
    """
    record = HiddenStateRecorder(model, [k for k, _ in branches], stack=stack)  # which says what is out of range
    named = [(k % len(record.stack), branch) for k, branch in branches]
    found = {k: _in_series(k, b) for k, b in branches_of(record.stack, record.blocks, probe).items()}
    for k, branch in named:
        if found[k].first != branch:
            _require_nothing_behind(record.stack, k, branch)
    norms: dict[tuple[int, Branch], BranchNorm] = {}
    fitted = _measure(model, fit, named, found, stack, "fit", norms if normed else None)
    apart = _measure(model, held_out, named, found, stack, "hold out", norms if normed else None)
    solved = []
    for k, branch in named:
        solution = solve(fitted[k, branch], apart[k, branch])
        errors = solution.held_out_error, solution.removal_error
        place = found[k].first == branch
        norm = norms.get((k, branch))
        solved.append(BranchLinear(k, branch, place, solution.map, solution.ridge, *errors, norm))
    return solved


def fit_branches(
    stack: BlockStack,
    branches: Sequence[tuple[int, Branch]],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
) -> dict[tuple[int, Branch], BranchLinear | UnsupportedSurgery]:
    """Fit linear maps for branches, or return why a branch cannot be replaced."""

    def fitted(part: Sequence[tuple[int, Branch]]) -> list[BranchLinear]:
        return fit_branch_linear(stack.model, part, fit, held_out, stack=stack.path, probe=probe)

    return dict(zip(branches, fit_possible(branches, fitted), strict=True))


def replace_branches(surgeon: LayerSurgeon, fitted: Sequence[BranchLinear]) -> list[nn.Module]:
    """Silence branches and splice in their maps in an open surgeon; return the maps in the order of `fitted`.

    All branches must be given in one call, before anything else is inserted beside these blocks: the map of the first
    branch runs before its block, the map of the second right after it.
    """
    modules: dict[int, nn.Module] = {}
    for one in fitted:
        if not one.is_first:
            _require_free(surgeon, one)
    for k in sorted(range(len(fitted)), key=lambda k: (fitted[k].block, not fitted[k].is_first)):
        one = fitted[k]
        surgeon.silence(one.block, one.branch)
        place = one.block if one.is_first else one.block + 1
        modules[k] = surgeon.insert(place, one.module())
    return [modules[k] for k in range(len(fitted))]


def _measure(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    named: Sequence[tuple[int, Branch]],
    found: Mapping[int, Branches],
    stack: str | None,
    what: str,
    norms: dict[tuple[int, Branch], BranchNorm] | None,
) -> dict[tuple[int, Branch], WindowMoments]:
    """Sum the moments of the states before and after branches, normalised if `norms` is given (and filled)."""
    record = HiddenStateRecorder(model, [max(found)], inputs=False, stop=True, stack=stack)
    wanted = set(named)
    passed: dict[tuple[int, Branch], tuple[Tensor, Tensor]] = {}
    moments: dict[tuple[int, Branch], WindowMoments] = {}

    def receive(k: int, branch: Branch, before: Tensor, after: Tensor) -> None:
        if (k, branch) in wanted:
            passed[k, branch] = before.clone(), after.clone()

    cost = f"{what}: {len(named)} branches, {max(found) + 1} of {len(record.stack)} blocks"
    blocks = {k: record.stack[k] for k in found}
    watched = {k: blocks[k] for k, branch in named if norms is not None and (k, branch) not in norms}
    with (
        reading_branches(blocks, found, receive),
        watching_norms(watched) as seen,
        recorded(model, batches, record, cost) as runs,
    ):
        for _, mask, _ in runs:
            for (k, branch), (before, after) in passed.items():
                sums = moments.setdefault((k, branch), WindowMoments(before.shape[-1]))
                if norms is None:
                    sums.update(before, after, mask)
                    continue
                if (k, branch) not in norms:
                    norms[k, branch] = norm_of(k, branch, before, seen[k])
                state, added = widen(norms[k, branch](before)), widen(after) - widen(before)  # rounded once, not twice
                sums.update(state, state + added, mask, relative_to=after)
            passed.clear()
            for made in seen.values():
                made.clear()
    return moments


def _in_series(k: int, found: Branches | UnsupportedSurgery) -> Branches:
    if isinstance(found, UnsupportedSurgery):
        raise UnsupportedSurgery(f"No branch of block {k} can be replaced: {found} Choose another block.", "branches")
    if found.first is None:
        raise UnsupportedSurgery(
            f"No branch of block {k} can be replaced alone: its attention and its MLP work on the same state, so that "
            "a map of that state in the place of one of them can run neither before the block nor after it. Silence "
            "the branch, or replace the block.",
            "parallel",
        )
    return found


def _require_nothing_behind(stack: BlockStack, k: int, branch: Branch) -> None:
    """Raise if an earlier surgery put a module after a block, which would run before the map."""
    behind = spliced(stack[k + 1], BEFORE) if k + 1 < len(stack) else spliced(stack[k], AFTER)
    if behind:
        raise UnsupportedSurgery(
            f"The {branch} of block {k} cannot be replaced: behind the block stands a {type(behind[0]).__name__} that "
            "an earlier surgery put there, and a map in the branch's place would run after it. Silence the branch, or "
            "choose another one.",
            "spliced",
        )


def _require_free(surgeon: LayerSurgeon, one: BranchLinear) -> None:
    """Raise if a module is already inserted after the block, where it would run before the map."""
    plan, place = surgeon.plan, one.block + 1
    slot = plan.old_to_new.get(one.block)
    if slot is None:
        return  # `silence` says that the block is gone
    behind = [s.module for s in plan.splices if s.old_before == place and (s.replaces or (0, 0))[0] != place]
    behind += [s.module for s in plan.slots[slot + 1 : slot + 2] if s.source is None]
    if behind:
        raise StreamlineError(
            f"A {behind[0]} stands behind block {one.block} already, and would run before the map in the place of its "
            f"{one.branch}. Replace branches first, all in one call."
        )


@dataclass(frozen=True)
class BranchNorm:
    """Norm h ↦ h·w / √(mean(h²) + ε), with w of shape (features,)."""

    weight: Tensor
    eps: float

    def __call__(self, state: Tensor) -> Tensor:
        """Normalise a state of shape (..., features)."""
        return F.rms_norm(state, self.weight.shape, self.weight.to(state.device, state.dtype), self.eps)


@contextmanager
def watching_norms(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, list[tuple[nn.Module, Tensor, Tensor]]]]:
    """Keep input and output of every norm-like submodule of blocks, in their latest forward."""
    seen: dict[int, list[tuple[nn.Module, Tensor, Tensor]]] = {k: [] for k in blocks}
    handles = []

    def keep(k: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[k].append((module, args[0].detach().clone(), output.detach().clone()))

    try:
        for k, block in blocks.items():
            for module in block.modules():
                if isinstance(_eps(module), float) and getattr(getattr(module, "weight", None), "ndim", 0) == 1:
                    handles.append(module.register_forward_hook(lambda m, a, o, k=k: keep(k, m, a, o)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def norm_of(k: int, branch: Branch, state: Tensor, seen: list[tuple[nn.Module, Tensor, Tensor]]) -> BranchNorm:
    """Return the RMS norm that received the state entering a branch; raise UnsupportedSurgery if none did."""
    for module, given, made in seen:
        if given.numel() != state.numel() or not torch.equal(given.reshape(state.shape), state):
            continue
        eps = _eps(module)
        assert eps is not None
        for shift in (0.0, 1.0):  # Gemma's weights are around zero
            norm = BranchNorm(module.get_parameter("weight").detach().clone() + shift, eps)
            bound = max(tolerance(made.dtype), tolerance(torch.float32))  # in which norms compute, of whatever they are
            if (norm(given) - made).abs().max() <= bound * made.abs().max():
                return norm
        raise UnsupportedSurgery(
            f"The {branch} of block {k} reads the state through a {type(module).__name__}, which is no RMS norm. Fit a "
            "map of the state as it is (normed=False).",
            "norm",
        )
    raise UnsupportedSurgery(
        f"The {branch} of block {k} does not read the state through a norm of its own. Fit a map of the state as it is "
        "(normed=False).",
        "norm",
    )


def _eps(module: nn.Module) -> float | None:
    found = [getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)]
    return float(found[0]) if found and isinstance(found[0], (int, float)) else None
