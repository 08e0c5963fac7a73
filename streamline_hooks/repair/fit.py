"""Fit replacements by least squares: their linear map in closed form, or else their last projection."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    Batches,
    DistributedStep,
    StreamlineError,
    UnsupportedSurgery,
    distributed_step,
    model_digest,
    progress_bar,
    texts_digest,
    to_float64,
    validate_arguments,
    warn_caller,
)
from streamline_hooks.modeling import (
    BlockCall,
    BlockStack,
    Branch,
    Branches,
    StateSource,
    branches_of,
    check_windows,
    closing_generator,
    inference,
    require_default_layout,
    sum_order_tolerance,
    write_input,
)
from streamline_hooks.repair.configs import ReplacementConfig
from streamline_hooks.repair.least_squares import (
    ProjectionMoments,
    add_to_projection,
    is_solvable,
    merged_moments,
    solve_least_squares,
    solve_projection,
)
from streamline_hooks.repair.placement import Repair, WindowReplacement, blocks_of
from streamline_hooks.statistics import WindowMoments, moments_by_window
from streamline_hooks.surgery import BEFORE, as_state_source, match_block, run_splices

_ROUNDING = 1e-9  # tolerance of a comparison of relative errors


@validate_arguments()
def fit_windows(
    model: nn.Module | StateSource,
    windows: Sequence[range],
    replacement: ReplacementConfig,
    fit: Batches,
    held_out: Batches,
    *,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
) -> list[Repair]:
    """Fit a least-squares replacement for each window of the current model.

    A replacement with a linear map starts at the closed-form solution; its other layers start with zero output. For
    other replacements the last projection is solved by least squares on its input features.

    Parameters
    ----------
    model : torch.nn.Module or StateSource
    windows : sequence of range
    replacement : ReplacementConfig
    fit, held_out : sequence of mapping or torch.Tensor
        Batches to fit on, and batches of other documents to choose the ridge on.
    stack : str, optional
        Path of the block stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        A batch without padding. Required only for models that cannot be probed with random tokens.

    Returns
    -------
    list of Repair
        One per window, for `insert_replacement`. A replacement that was fitted inside an open surgeon can only be
        inserted in that surgeon, because copied blocks keep the layer index that they have there.

    Raises
    ------
    UnsupportedSurgery
        If the kind cannot replace a window.
    StreamlineError
        If the batches contain no real token, or the hidden states or outputs are not finite.

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
    source = as_state_source(model, stack)
    check_windows(source.stack, windows)
    replacement_modules = [(window, replacement.build(source.stack, window, probe=probe)) for window in windows]
    repairs = []
    for repair in fit_replacements(source, replacement, replacement_modules, fit, held_out, probe=probe):
        if isinstance(repair, UnsupportedSurgery):
            raise repair
        repairs.append(repair)
    return repairs


def fit_replacements(
    source: StateSource,
    kind: ReplacementConfig,
    replacement_modules: Sequence[tuple[range, WindowReplacement]],
    fit: Batches,
    held_out: Batches,
    *,
    probe: Batch | Tensor | None = None,
    desc: str = "",
) -> list[Repair | UnsupportedSurgery]:
    """Fit replacement modules in place, in one shared pass over each part of the data.

    Windows refer to the current model. Return for each window a `Repair`, or an UnsupportedSurgery if the kind cannot
    replace it.
    """
    stack = source.stack
    for window, replacement_module in replacement_modules:
        if isinstance(replacement_module, nn.Module):
            match_block(replacement_module, stack[window.start])
    if kind.fit is not None:
        fitted = kind.fit(source, [window for window, _ in replacement_modules], fit, held_out, probe, desc)
        for repair in fitted:
            if isinstance(repair, Repair) and isinstance(repair.replacement_module, nn.Module):
                match_block(repair.replacement_module, stack[repair.window.start])
        return fitted
    closed_form: list[int] = []
    parallel: list[int] = []
    for k, (_, replacement_module) in enumerate(replacement_modules):
        (closed_form if kind.is_solved and holds_map(replacement_module) else parallel).append(k)
    repair_results: dict[int, Repair | UnsupportedSurgery] = {}
    if closed_form:
        repairs = _fit_closed_form(source, [replacement_modules[k] for k in closed_form], fit, held_out, desc)
        repair_results.update(zip(closed_form, repairs, strict=True))
    if parallel:
        parallel_replacements = [
            _parallel_replacement(stack, *replacement_modules[k], probe, kind.is_solved) for k in parallel
        ]
        with parallel_moments(source, fit, held_out, parallel_replacements, desc=desc) as moments:
            for number, pair in moments:
                k, module = parallel[number], replacement_modules[parallel[number]][1]
                repair_results[k] = _fit_last_projection(
                    parallel_replacements[number], module, *pair, keep_weights=not kind.is_solved
                )
        if kind.is_solved:
            _warn_of_unsolved_copies(parallel_replacements, [repair_results[k] for k in parallel])
    return [repair_results[k] for k in range(len(replacement_modules))]


def holds_map(replacement_module: WindowReplacement) -> bool:
    """Whether a replacement can start at the closed-form linear map; True for plain removal (None)."""
    return replacement_module is None or (
        hasattr(replacement_module, "start_at") and getattr(replacement_module, "holds_map", True)
    )


def _fit_closed_form(
    source: StateSource,
    replacement_modules: Sequence[tuple[range, WindowReplacement]],
    fit: Batches,
    held_out: Batches,
    desc: str,
) -> list[Repair]:
    windows = [window for window, _ in replacement_modules]
    parts, name = [(f"fit{desc}", fit), (f"held-out moments{desc}", held_out)], "solve least squares"
    repairs: dict[int, Repair] = {}
    bar = progress_bar(len(windows), name, "windows")
    with distributed_step(name) as step, moments_by_window(source, parts, windows) as moments, bar:
        for number, (fit_moments, held_out_moments) in moments:
            bar.unpause()  # the passes for the moments have bars of their own
            window, replacement_module = replacement_modules[number]
            repairs[number] = solve_window(step, window, replacement_module, fit_moments, held_out_moments)
            del fit_moments, held_out_moments  # before the moments of the next window are summed
            bar.update()
    return [repairs[number] for number in range(len(windows))]


def solve_window(
    work: DistributedStep,
    window: range,
    replacement_module: WindowReplacement,
    fit: WindowMoments | None,
    held_out: WindowMoments | None,
) -> Repair:
    """Initialize a replacement with the least-squares map of its window, solved on rank 0."""
    fit, held_out = fit or WindowMoments(0), held_out or WindowMoments(0)
    rank, diagonal = getattr(replacement_module, "rank", None), getattr(replacement_module, "diagonal", False)
    solution = work.broadcast_object(partial(solve_least_squares, fit, held_out, rank=rank, diagonal=diagonal))
    if not isinstance(replacement_module, nn.Module):
        return Repair(window, replacement_module, solution.removal_error, solution.removal_error, solution.ridge)
    replacement_module.start_at(solution.map)  # type: ignore[operator]
    return Repair(window, replacement_module, solution.removal_error, solution.held_out_error, solution.ridge)


def _parallel_replacement(
    stack: BlockStack, window: range, replacement_module: WindowReplacement, probe: Batch | Tensor | None, solve: bool
) -> ParallelReplacement:
    """Return a replacement with the blocks whose calls it copies and the projection to solve."""
    assert isinstance(replacement_module, nn.Module)
    blocks = blocks_of(stack, replacement_module)
    originals = tuple(stack[k] for k in window[: len(blocks)])
    if not solve:
        return ParallelReplacement(window, blocks or (replacement_module,), bool(blocks), originals=originals)
    if blocks:
        last = window.start + len(blocks) - 1
        branches = branches_of(stack, [last], probe)[last]
        return ParallelReplacement(window, blocks, True, _inherited_projection(blocks[-1], branches), originals)
    name = getattr(replacement_module, "last_projection", None)
    if name is None:
        return ParallelReplacement(window, (replacement_module,), False)
    projection = dict(replacement_module.named_modules()).get(name)
    if projection is None or not is_solvable(projection):
        raise StreamlineError(
            f"{type(replacement_module).__name__}.last_projection={name!r} is a {type(projection).__name__}. Expected "
            "the path of an nn.Linear in the module. Correct last_projection."
        )
    if _is_shared(projection, replacement_module):
        raise StreamlineError(
            f"{type(replacement_module).__name__}.last_projection={name!r} shares its weight or bias with another "
            "layer of the module, which least squares would change too. Expected a layer with its own parameters. Name "
            "another layer, or do not share the parameter."
        )
    return ParallelReplacement(window, (replacement_module,), False, projection)


def _inherited_projection(block: nn.Module, branches: Branches | UnsupportedSurgery) -> nn.Module | None:
    """Return the output projection of the last trainable branch, if it is a single linear layer."""
    if isinstance(branches, UnsupportedSurgery):
        return None
    order: tuple[Branch, Branch] = ("attention", "mlp") if branches.first == "mlp" else ("mlp", "attention")
    for branch in order:
        paths = branches.writers[branch]
        if all(block.get_parameter(path).requires_grad for path in paths):
            owners = {path.rpartition(".")[0] for path in paths}
            projection = block.get_submodule(owners.pop())
            can_be_solved = not owners and is_solvable(projection) and not _is_shared(projection, block)
            return projection if can_be_solved else None
    return None


def _is_shared(projection: nn.Module, module: nn.Module) -> bool:
    """Whether a parameter of a projection in a module also belongs to another layer of the module."""
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return any(uses[id(p)] > 1 for p in projection.parameters())


def _fit_last_projection(
    parallel_replacement: ParallelReplacement,
    replacement_module: WindowReplacement,
    fit: ProjectionMoments,
    held_out: ProjectionMoments,
    keep_weights: bool,
) -> Repair | UnsupportedSurgery:
    name, all_moments = type(parallel_replacement.blocks[-1]).__name__, merged_moments(fit, held_out)
    if not math.isfinite(all_moments.dd) or not math.isfinite(all_moments.removed):
        raise StreamlineError(
            f"The output of the replacement {name} is not finite. Check its initial weights for NaN and infinity."
        )
    inputs = len(all_moments.xx)
    if parallel_replacement.projection is not None and not inputs and not parallel_replacement.takes_slots:
        raise StreamlineError(
            f"Cannot solve the last projection of {name} by least squares: its output is not added unchanged to the "
            "output of the module. Name another layer in the attribute last_projection, or remove the attribute."
        )
    repair = Repair(parallel_replacement.window, replacement_module, held_out.removal, held_out.unchanged, None)
    error = all_moments.unchanged
    if inputs:
        assert parallel_replacement.projection is not None
        solution = solve_projection(fit, held_out)
        add_to_projection(parallel_replacement.projection, solution.map)
        error = all_moments.error(solution.map)
        repair = replace(repair, repaired_error=solution.held_out_error, ridge=solution.ridge)
    if parallel_replacement.takes_slots and not keep_weights and error > all_moments.removal + _ROUNDING:
        state = "with its last projection solved by least squares" if inputs else "unchanged"
        return UnsupportedSurgery(
            f"An inherited {name} is worse than plain removal of this window: {state}, its relative squared error on "
            f"the calibration data is {error:.4f}; that of plain removal is {all_moments.removal:.4f}. Choose another "
            "kind.",
            "inherited",
        )
    return repair


def _warn_of_unsolved_copies(
    replacements: Sequence[ParallelReplacement], repairs: Sequence[Repair | UnsupportedSurgery]
) -> None:
    """Warn of inherited blocks whose last projection least squares did not solve."""
    names = {
        type(replacement.blocks[-1]).__name__
        for replacement, repair in zip(replacements, repairs, strict=True)
        if replacement.takes_slots and isinstance(repair, Repair) and repair.ridge is None
    }
    for name in sorted(names):
        warn_caller(
            f"An inherited {name} starts as a copy, because least squares cannot solve its last projection. Expected "
            "one linear layer that is not quantized, and whose output is added to the hidden state unchanged. Train "
            "the replacement, or choose another kind."
        )


_TOKENS_AT_ONCE = 2048
_Calls = Mapping[int, tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class ParallelReplacement:
    """A replacement that runs in parallel to its window.

    `blocks` is either one module without a slot, or copies of blocks (`takes_slots`). Each copy is called with the
    arguments of the corresponding block in `originals`. `projection` is the last projection to solve, or None to only
    measure the error.
    """

    window: range
    blocks: tuple[nn.Module, ...]
    takes_slots: bool
    projection: nn.Module | None = None
    originals: tuple[nn.Module, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Digest of the blocks before the projection is solved."""
        return texts_digest(map(model_digest, self.blocks))

    def run(self, entering: Tensor, calls: _Calls) -> Tensor:
        """Return the output of the replacement for window inputs of shape (batch, tokens, features)."""
        state = entering
        for number, (k, block) in enumerate(zip(self.window, self.blocks, strict=False)):
            if 0 < number < len(self.originals):
                state = run_splices(self.originals[number], BEFORE, state)
            with inference(block):
                state = BlockCall(block, *calls[k], state).run(state, {}) if self.takes_slots else block(state.clone())
        return state


class _ParallelSums:
    """The moments of a parallel replacement; its entry of `factors` is measured on the first batch."""

    def __init__(self, number: int, replacement: ParallelReplacement, calls: _Calls, factors: dict[int, float]) -> None:
        self.moments = ProjectionMoments(0, 0)
        self._number, self._replacement, self._calls, self._factors = number, replacement, calls, factors

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        """Run the replacement on a batch and add its moments."""
        replacement = self._replacement
        if self._number not in self._factors:
            self._factors[self._number] = _projection_factor(replacement, entering, self._calls, mask)
        outputs, features = _run_recorded(replacement, entering, self._calls, self._factors[self._number])
        if not self.moments.tokens:
            self.moments = ProjectionMoments(features.shape[-1], outputs.shape[-1])
        chunks = (
            _real_tokens(tensor, mask).split(_TOKENS_AT_ONCE) for tensor in (features, outputs, entering, leaving)
        )
        for chunk in zip(*chunks, strict=True):
            self.moments.add(*chunk)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, the factor and the digest of the replacement that they were measured with."""
        factor = self._factors.get(self._number, 0.0)
        return {**self.moments.state_dict(), "factor": factor, "replacement": self._replacement.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the sums and the factor."""
        self.moments.load_state_dict(state)
        self._factors[self._number] = float(state["factor"])


@closing_generator
def parallel_moments(
    source: StateSource,
    fit: Sequence[Batch | Tensor],
    held_out: Sequence[Batch | Tensor],
    replacements: Sequence[ParallelReplacement],
    *,
    desc: str = "",
) -> Generator[tuple[int, tuple[ProjectionMoments, ProjectionMoments]], None, None]:
    """Sum the moments of several parallel replacements in one pass over each part of the data.

    The pass ends after the last block of any window. Yield the index of a replacement and its moments (fit, held out)
    as soon as they are complete. The moments have no input features if there is no last projection, or if its output
    does not enter the state linearly (for example because a norm follows).
    """
    stack = source.stack
    used_blocks = {k for replacement in replacements for k in (replacement.window.start, replacement.window.stop - 1)}
    advice = "Remove blocks without a repair with LayerSurgeon."
    require_default_layout((stack[k] for k in used_blocks), f"{type(source.model).__name__} cannot be repaired", advice)
    parts, factors = [(f"fit{desc}", fit), (f"held-out moments{desc}", held_out)], dict[int, float]()
    rerun = [len(replacement.blocks) if replacement.takes_slots else 0 for replacement in replacements]
    windows = [replacement.window for replacement in replacements]
    with _recorded_calls(stack, replacements) as calls:

        def make(number: int, features: int) -> _ParallelSums:
            return _ParallelSums(number, replacements[number], calls, factors)

        with source.window_sums(parts, windows, make, rerun=rerun) as results:
            for number, sums in results:
                fit_moments, held_out_moments = (
                    ProjectionMoments(0, 0) if part is None else part.moments for part in sums
                )
                yield number, (fit_moments, held_out_moments)


@contextmanager
def _recorded_calls(stack: BlockStack, replacements: Sequence[ParallelReplacement]) -> Iterator[_Calls]:
    """Record the latest call arguments of the window blocks that a replacement copies."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(k: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            # Replace the state by a placeholder: it is recorded separately, and a block may modify it in place.
            calls[k] = write_input(args, kwargs, torch.zeros(1, 1), block)

        return hook

    with ExitStack() as exits:
        for k in {
            k
            for replacement in replacements
            if replacement.takes_slots
            for k in replacement.window[: len(replacement.blocks)]
        }:
            exits.callback(stack[k].register_forward_pre_hook(record(k), with_kwargs=True).remove)
        yield calls


def _run_recorded(
    replacement: ParallelReplacement, entering: Tensor, calls: _Calls, factor: float
) -> tuple[Tensor, Tensor]:
    """Return the output of a replacement and the input of its last projection, multiplied by `factor`."""
    if replacement.projection is None or factor == 0:
        output = replacement.run(entering, calls)
        return output, output[..., :0]
    with _watched(replacement.projection) as inputs:
        output = replacement.run(entering, calls)
    features = inputs[0].reshape(*output.shape[:-1], -1)
    if isinstance(replacement.projection.bias, Tensor):
        features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
    return output, factor * features


def _projection_factor(replacement: ParallelReplacement, entering: Tensor, calls: _Calls, mask: Tensor) -> float:
    """Return the factor with which the last projection enters the output, or 0 if it does not enter linearly."""
    if replacement.projection is None:
        return 0.0
    size = entering.square().mean(dim=-1, keepdim=True).sqrt()
    noise = torch.randn(entering.shape, generator=torch.Generator().manual_seed(0)).to(entering) * size
    outputs = []
    for scale in (0.0, 1.0):
        with _watched(replacement.projection, scale * noise) as inputs:
            outputs.append(to_float64(_real_tokens(replacement.run(entering, calls), mask)))
        if len(inputs) != 1:
            return 0.0
    noise, response = to_float64(_real_tokens(noise, mask)), outputs[1] - outputs[0]
    factor = float((response * noise).sum() / noise.square().sum().clamp_min(1e-300))
    magnitude = (outputs[0].abs() + noise.abs()).amax(dim=-1, keepdim=True)
    linear = ((response - factor * noise).abs() <= sum_order_tolerance(entering.dtype) * magnitude).all()
    return factor if linear else 0.0


def _real_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Return the real tokens of states; states without a batch axis are treated as one row."""
    return states.reshape(*mask.shape, states.shape[-1])[mask]


@contextmanager
def _watched(projection: nn.Module, replaced_output: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Record the inputs of a projection, and replace its output if `replaced_output` is given."""
    inputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        inputs.append(args[0])
        return None if replaced_output is None else replaced_output.reshape(output.shape)

    handle = projection.register_forward_hook(hook)
    try:
        yield inputs
    finally:
        handle.remove()
