"""Fit replacements: in closed form where they can hold a linear map, else by their last projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import Branch, Branches, tolerance
from streamline_hooks.distributed import distributed_step
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.hidden_state import write_input
from streamline_hooks.layouts import require_usual
from streamline_hooks.passes import inference, progress, recorded
from streamline_hooks.precision import widen
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.repair.closed_form import ProjectionMoments, change, merged, solvable, solve, solve_projection
from streamline_hooks.repair.replacement_config import ReplacementConfig
from streamline_hooks.repair.stand_in import Batches, Repair, StandIn, blocks_of
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics import measure_moments
from streamline_hooks.surgery.placement import move_beside
from streamline_hooks.surgery.silence import branches_of
from streamline_hooks.surgery.splice import BEFORE, run_splices

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
    """Fit the replacements `stand_ins`, in place, in one pass for all that share one.

    Return for each window, numbered as the model is now, a `Repair` or the reason why the kind cannot replace it.
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
    """Whether a replacement can start at the closed form; plain removal (None) can."""
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
    """Return how to run a replacement in parallel to its window, and which projection to solve for."""
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
    """Return the output projection of the last trained branch, if that is one linear layer."""
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


_TOKENS_AT_ONCE = 2048
_Calls = Mapping[int, tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Beside:
    """Replacement that is run in parallel to its window.

    `blocks` is one module without a slot, or blocks of the model's class (`takes_slots`), each called like the block
    of the window in the same place, `places`. `projection` is the last projection to solve for; None only measures the
    error.
    """

    window: range
    blocks: tuple[nn.Module, ...]
    takes_slots: bool
    projection: nn.Module | None = None
    places: tuple[nn.Module, ...] = ()

    def run(self, entering: Tensor, calls: _Calls) -> Tensor:
        """Return the output of the replacement for the states entering the window, (batch, tokens, features)."""
        state = entering
        for number, (k, block) in enumerate(zip(self.window, self.blocks, strict=False)):
            if 0 < number < len(self.places):
                state = run_splices(self.places[number], BEFORE, state)
            with inference(block):
                state = BlockCall(block, *calls[k], state).run(state, {}) if self.takes_slots else block(state.clone())
        return state


def measure_beside(
    model: nn.Module,
    fit: Sequence[Batch | Tensor],
    held_out: Sequence[Batch | Tensor],
    asked: Sequence[Beside],
    *,
    stack: str | None = None,
    what: str = "",
) -> list[tuple[ProjectionMoments, ProjectionMoments]]:
    """Sum the moments of several replacements in one pass over each part of the text.

    The pass ends after the last block of any window. Return (fit, held out) for each replacement; they have no inputs
    if there is no last projection, or if its output is not added to the state times a constant (a norm follows it).
    """
    found = find_stack(model, stack)
    needed = {k for one in asked for k in (one.window.start, one.window.stop - 1)}
    advice = "Take blocks out with LayerSurgeon, which fits nothing."
    require_usual((found[k] for k in needed), f"{type(model).__name__} cannot be repaired", advice)
    cost = f"{what}: {len(asked)} windows, {max(needed) + 1} of {len(found)} blocks"
    both: list[list[ProjectionMoments]] = []
    factors: list[float] = []
    for part, batches in (("fit", fit), ("hold out", held_out)):
        record = HiddenStateRecorder(model, sorted(needed), stop=True, stack=found.path)
        sums: list[ProjectionMoments] = []
        with _calls_of(found, asked) as calls, recorded(model, batches, record, part + cost) as passed:
            for _, mask, _ in passed:
                entering = [record.inputs[one.window.start][0] for one in asked]
                factors = factors or [_factor(one, x, calls, mask) for one, x in zip(asked, entering, strict=True)]
                for number, (one, x) in enumerate(zip(asked, entering, strict=True)):
                    made, features = _made(one, x, calls, factors[number])
                    if len(sums) == number:
                        sums.append(ProjectionMoments(features.shape[-1], made.shape[-1]))
                    leaving = record.outputs[one.window.stop - 1][0]
                    real = (_real(tensor, mask).split(_TOKENS_AT_ONCE) for tensor in (features, made, x, leaving))
                    for tokens in zip(*real, strict=True):
                        sums[number].add(*tokens)
        both.append(sums)
    return list(zip(*both, strict=True))


@contextmanager
def _calls_of(stack: BlockStack, asked: Sequence[Beside]) -> Iterator[_Calls]:
    """Record the arguments of the blocks of windows in the latest forward, including earlier splices."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(k: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            # The state is recorded apart: a block may work on this one in place.
            calls[k] = write_input(args, kwargs, torch.zeros(1, 1), block)

        return hook

    with ExitStack() as exits:
        for k in {k for one in asked if one.takes_slots for k in one.window[: len(one.blocks)]}:
            exits.callback(stack[k].register_forward_pre_hook(keep(k), with_kwargs=True).remove)
        yield calls


def _made(one: Beside, entering: Tensor, calls: _Calls, factor: float) -> tuple[Tensor, Tensor]:
    """Return the output of a replacement, and the input of its last projection times its factor."""
    if one.projection is None or factor == 0:
        made = one.run(entering, calls)
        return made, made[..., :0]
    with _Watch(one.projection) as watch:
        made = one.run(entering, calls)
    features = watch.received[0].reshape(*made.shape[:-1], -1)
    if isinstance(one.projection.bias, Tensor):
        features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
    return made, factor * features


def _factor(one: Beside, entering: Tensor, calls: _Calls, mask: Tensor) -> float:
    """Return the factor by which the last projection enters the state; 0 if it does not enter linearly."""
    if one.projection is None:
        return 0.0
    size = entering.square().mean(dim=-1, keepdim=True).sqrt()
    noise = torch.randn(entering.shape, generator=torch.Generator().manual_seed(0)).to(entering) * size
    outputs = []
    for scale in (0.0, 1.0):
        with _Watch(one.projection, scale * noise) as watch:
            outputs.append(widen(_real(one.run(entering, calls), mask)))
        if len(watch.received) != 1:
            return 0.0
    noise, added = widen(_real(noise, mask)), outputs[1] - outputs[0]
    factor = float((added * noise).sum() / noise.square().sum().clamp_min(1e-300))
    large = (outputs[0].abs() + noise.abs()).amax(dim=-1, keepdim=True)
    linear = ((added - factor * noise).abs() <= tolerance(entering.dtype) * large).all()
    return factor if linear else 0.0


def _real(states: Tensor, mask: Tensor) -> Tensor:
    """Select real tokens; a state without a batch axis is one row of them."""
    return states.reshape(*mask.shape, states.shape[-1])[mask]


class _Watch:
    """Record the input of a projection, and optionally replace its output."""

    def __init__(self, projection: nn.Module, instead: Tensor | None = None) -> None:
        self._projection, self._instead = projection, instead
        self.received: list[Tensor] = []

    def __enter__(self) -> Self:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.received.append(args[0])

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return None if self._instead is None else self._instead.reshape(output.shape)

        self._handles = [self._projection.register_forward_pre_hook(before)]
        self._handles.append(self._projection.register_forward_hook(after))
        return self

    def __exit__(self, *given: object) -> None:
        for handle in self._handles:
            handle.remove()
