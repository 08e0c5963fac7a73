"""Start what stands in the place of windows: in closed form where it can hold the map, else by its last projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.branches import Branch, Branches
from streamline_hooks.distributed import distributed_step
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.passes import progress
from streamline_hooks.repair.beside import Beside, measure_beside
from streamline_hooks.repair.closed_form import solve
from streamline_hooks.repair.projection import ProjectionMoments, change, merged, solvable, solve_projection
from streamline_hooks.repair.repaired import Batches, Repair
from streamline_hooks.repair.replacement_config import ReplacementConfig
from streamline_hooks.repair.stand_in import StandIn, blocks_of
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics import measure_moments
from streamline_hooks.surgery.placement import move_beside
from streamline_hooks.surgery.silence import branches_of

_ROUNDING = 1e-9  # of an error that is relative


@checked()
def fit_windows(
    model: nn.Module,
    windows: Sequence[range],
    replacement: ReplacementConfig,
    fit: Batches,
    held_out: Batches,
    *,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
) -> list[Repair]:
    """Make what stands in the place of windows, each started at the least squares that its kind allows.

    A kind that can hold a linear map starts at the closed form, with its last layer at zero beside it. For another one
    the last projection is solved by least squares on the features that it has or has inherited. Every window is fitted
    on the model as it is.

    Parameters
    ----------
    model : torch.nn.Module
    windows : sequence of range
    replacement : ReplacementConfig
        The config of what replaces each window.
    fit, held_out : sequence of mapping or torch.Tensor
        To fit on, and to choose the ridge by; of different documents.
    stack : str, optional
        Path of the stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        What to look for branches on in a model that cannot be probed otherwise, without padding.

    Returns
    -------
    list of Repair
        One a window; `place` puts them in. What was fitted inside an open surgeon is to be placed in that one: a copy
        of a block bears the number that it had there.

    Raises
    ------
    UnsupportedSurgery
        If the kind cannot stand in a window's place; the text says why.
    StreamlineError
        As `measure_moments` and `solve`.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.repair import LinearConfig
    >>> from streamline_hooks.testing import tiny_model
    >>> model, batches = tiny_model("llama"), [torch.arange(3, 63).view(6, 10)]
    >>> (repair,) = fit_windows(model, [range(2, 5)], LinearConfig(rank=8), batches, batches)
    >>> repair.repaired_error < repair.removal_error
    True
    """
    found = find_stack(model, stack)
    stand_ins = [(window, replacement.build(found, window, probe=probe)) for window in windows]
    repairs = start(found, replacement, stand_ins, fit, held_out, probe=probe)
    for repair in repairs:
        if isinstance(repair, UnsupportedSurgery):
            raise repair
    return [repair for repair in repairs if isinstance(repair, Repair)]


def start(
    stack: BlockStack,
    kind: ReplacementConfig,
    stand_ins: Sequence[tuple[range, StandIn]],
    fit: Batches,
    held_out: Batches,
    *,
    probe: Batch | Tensor | None = None,
    what: str = "",
) -> list[Repair | UnsupportedSurgery]:
    """Fit what was built for windows, in one pass for all that share one.

    Parameters
    ----------
    stack : BlockStack
        Of the model as it is now.
    kind : ReplacementConfig
    stand_ins : sequence of (range, StandIn)
        Windows in the present numbering, and what the kind built for them; they are changed.
    fit, held_out, probe
        As for `fit_windows`.
    what : str
        What the bars say, after "fit" and "hold out".

    Returns
    -------
    list of Repair or UnsupportedSurgery
        One a window, or why the kind cannot stand there.
    """
    for window, stand_in in stand_ins:
        if isinstance(stand_in, nn.Module):
            move_beside(stand_in, stack[window.start])
    if kind.fit is not None:
        fitted = kind.fit(stack, [window for window, _ in stand_ins], fit, held_out, probe, what)
        for repair in fitted:
            if isinstance(repair, Repair) and isinstance(repair.stand_in, nn.Module):
                move_beside(repair.stand_in, stack[repair.window.start])
        return fitted
    found: dict[int, Repair | UnsupportedSurgery] = {}
    mapped = [k for k, (_, stand_in) in enumerate(stand_ins) if kind.is_solved and holds_map(stand_in)]
    beside = [k for k in range(len(stand_ins)) if k not in mapped]
    if mapped:
        found.update(zip(mapped, _at_map(stack, [stand_ins[k] for k in mapped], fit, held_out, what), strict=True))
    if beside:
        asked = [_beside(stack, *stand_ins[k], probe, kind.is_solved) for k in beside]
        sums = measure_beside(stack.model, fit, held_out, asked, stack=stack.path, what=what)
        for k, one, pair in zip(beside, asked, sums, strict=True):
            found[k] = _by_projection(one, stand_ins[k][1], *pair, as_it_is=not kind.is_solved)
    return [found[k] for k in range(len(stand_ins))]


def holds_map(stand_in: StandIn) -> bool:
    """Whether a stand-in can start at the closed form: nothing at all does, as plain removal."""
    return stand_in is None or (hasattr(stand_in, "start_at") and getattr(stand_in, "holds_map", True))


def _at_map(
    stack: BlockStack, stand_ins: Sequence[tuple[range, StandIn]], fit: Batches, held_out: Batches, what: str
) -> list[Repair]:
    windows = [window for window, _ in stand_ins]
    pairs = zip(
        *(
            measure_moments(stack.model, batches, windows, stack=stack.path, what=part + what)
            for batches, part in ((fit, "fit"), (held_out, "hold out"))
        ),
        strict=True,
    )
    repairs = []
    with (
        distributed_step("solve least squares") as work,
        progress(len(windows), "solve least squares", "windows") as bar,
    ):
        for (window, stand_in), (fitted, apart) in zip(stand_ins, pairs, strict=True):
            rank, diagonal = getattr(stand_in, "rank", None), getattr(stand_in, "diagonal", False)
            solution = work.broadcast_object(partial(solve, fitted, apart, rank=rank, diagonal=diagonal))
            error = solution.removal_error
            if isinstance(stand_in, nn.Module):
                stand_in.start_at(solution.map)  # type: ignore[operator]
                error = solution.held_out_error
            repairs.append(Repair(window, stand_in, solution.removal_error, error, solution.ridge))
            bar.update()
    return repairs


def _beside(stack: BlockStack, window: range, stand_in: StandIn, probe: Batch | Tensor | None, solve: bool) -> Beside:
    """How to run a stand-in beside its window, and which of its projections to solve for."""
    assert isinstance(stand_in, nn.Module)
    blocks = blocks_of(stack, stand_in)
    places = tuple(stack[k] for k in window[: len(blocks)])
    if not solve:
        return Beside(window, blocks or (stand_in,), bool(blocks), places=places)
    if blocks:
        last = window.start + len(blocks) - 1
        branches = branches_of(stack, [last], probe)[last]
        return Beside(window, blocks, True, _inherited_projection(blocks[-1], branches), places)
    name = getattr(stand_in, "last_projection", None)
    if name is None:
        return Beside(window, (stand_in,), False)
    projection = dict(stand_in.named_modules()).get(name)
    if projection is None or not solvable(projection):
        raise StreamlineError(
            f"{type(stand_in).__name__} names {name!r} as its last projection, which is {type(projection).__name__}; "
            "expected the path of an nn.Linear below it."
        )
    return Beside(window, (stand_in,), False, projection)


def _inherited_projection(block: nn.Module, branches: Branches | UnsupportedSurgery) -> nn.Module | None:
    """The output projection of the last branch that is trained, where that is one linear layer."""
    if isinstance(branches, UnsupportedSurgery):
        return None
    order: tuple[Branch, Branch] = ("attention", "mlp") if branches.first == "mlp" else ("mlp", "attention")
    for branch in order:
        paths = branches.writers[branch]
        if all(block.get_parameter(path).requires_grad for path in paths):
            owners = {path.rpartition(".")[0] for path in paths}
            projection = block.get_submodule(owners.pop())
            return projection if not owners and solvable(projection) else None
    return None


def _by_projection(
    one: Beside, stand_in: StandIn, fit: ProjectionMoments, held_out: ProjectionMoments, as_it_is: bool
) -> Repair | UnsupportedSurgery:
    name, everything = type(one.blocks[-1]).__name__, merged(fit, held_out)
    if not torch.isfinite(torch.tensor([everything.dd, everything.removed])).all():
        raise StreamlineError(f"What {name} makes in the place of the window is not finite; look at its weights.")
    inputs = len(everything.xx)
    if one.projection is not None and not inputs and not one.takes_slots:
        raise StreamlineError(
            f"What the last projection that {name} names makes is not added to its output as it is, so that it cannot "
            "be solved for. Name another one as last_projection, or none."
        )
    repair = Repair(one.window, stand_in, held_out.removal, held_out.unchanged, None)
    error = everything.unchanged
    if inputs:
        assert one.projection is not None
        solution = solve_projection(fit, held_out)
        change(one.projection, solution.map)
        error = everything.error(solution.map)
        repair = replace(repair, repaired_error=solution.held_out_error, ridge=solution.ridge)
    if one.takes_slots and not as_it_is and error > everything.removal + _ROUNDING:
        how = "with its last projection solved by least squares" if inputs else "as it is"
        return UnsupportedSurgery(
            f"An inherited {name} cannot stand in this window's place: {how} it leaves a relative squared error of "
            f"{error:.4f} on the calibration text, and plain removal {everything.removal:.4f}. Choose another kind.",
            "inherited",
        )
    return repair
