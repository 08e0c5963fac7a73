"""Run stand-ins beside the windows that they are for, on the same states, in one pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import tolerance
from streamline_hooks.hidden_state import write_input
from streamline_hooks.layouts import require_usual
from streamline_hooks.passes import inference, recorded
from streamline_hooks.precision import widen
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.repair.projection import ProjectionMoments
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.splice import BEFORE, run_splices

_TOKENS_AT_ONCE = 2048
_Calls = Mapping[int, tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Beside:
    """A stand-in to be run beside the window that it is for.

    Attributes
    ----------
    window : range
    blocks : tuple of torch.nn.Module
        One module without a slot, or blocks of the model's class, each of which is called as the window's block in
        the same place is.
    takes_slots : bool
        Which of the two.
    projection : torch.nn.Module or None
        The last projection, a `torch.nn.Linear` or GPT-2's ``Conv1D`` in the last of `blocks`; None where there is
        none to be solved for, and only the error is measured.
    places : tuple of torch.nn.Module
        The blocks of the model in whose place those of `blocks` stand, if they take slots: what an earlier surgery put
        before the second and the later of these stays.
    """

    window: range
    blocks: tuple[nn.Module, ...]
    takes_slots: bool
    projection: nn.Module | None = None
    places: tuple[nn.Module, ...] = ()

    def run(self, entering: Tensor, calls: _Calls) -> Tensor:
        """What the stand-in makes of the states that enter the window, of shape (batch, tokens, features)."""
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
    """Sum the moments of several stand-ins in one pass, which ends after the last block that any window needs.

    Parameters
    ----------
    model : torch.nn.Module
        With the blocks of the windows in it.
    fit, held_out : sequence of mapping or torch.Tensor
        What the model's forward takes.
    asked : sequence of Beside
    stack : str, optional
        Path of the stack, see `find_stack`.
    what : str
        What the bars say, after "fit" and "hold out" and before what it costs.

    Returns
    -------
    list of (ProjectionMoments, ProjectionMoments)
        Two a stand-in, of the two parts of the text. They have no inputs where there is no last projection, or where
        what it makes is not added to the state times one number (a norm follows it).

    Raises
    ------
    UnsupportedSurgery
        If the states are not laid out as (batch, tokens, features).
    StreamlineError
        If a state is not finite.

    Notes
    -----
    Beside the blocks of the model each stand-in is run once a batch, and twice more on the first, where it is tried
    what its last projection adds.
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
    """What the blocks of the windows are called with in the latest forward, splices before them included."""
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
    """What a stand-in makes, and the features before its last projection as far as that adds them."""
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
    """By what the output of the last projection is multiplied on its way into the state; zero where it is not.

    Anything is put in the place of its output, about as large as the state, so that nothing drowns in rounding.
    """
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
    """Those of real tokens; a state without an axis for the batch is one row of them."""
    return states.reshape(*mask.shape, states.shape[-1])[mask]


class _Watch:
    """Keeps what a projection receives, and can put something else in the place of what it makes."""

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
