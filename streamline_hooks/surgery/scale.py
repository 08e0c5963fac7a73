"""Multiply the state at one place by a factor, through what the blocks behind it add: no new parameter.

Behind the place every branch, and the head, read the state through a norm, which does not see a common factor. So αh in
the place of h is the same as dividing by α what each branch behind the place adds: the state is then everywhere 1/α of
what it would be. Nothing before the place is touched, so that embeddings may be tied to the head. That a model is made
so is not looked up but shown on its logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare
from streamline_hooks.branches import BRANCHES, Branch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.hidden_state import read_input, read_output, write_input, write_output
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.alone import BranchAlone
from streamline_hooks.surgery.exchange import StandIns, stand_in_for
from streamline_hooks.surgery.fold import require_numbers
from streamline_hooks.surgery.probe import given_to_probe, logits_of_probe, undisturbed
from streamline_hooks.surgery.silence import branches_in, called

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest; 1e-3, mostly for a norm's eps, if wider

Held = Mapping[int, Mapping[Branch, Mapping[str, nn.Parameter]]]
"""The output projections of blocks' branches, by the paths below the block."""


def find_projections(stack: BlockStack, blocks: Iterable[int], what: str, batch: Batch | Tensor | None) -> Held:
    """Find the output projections of all branches of blocks, and that what they add grows with them.

    Parameters
    ----------
    stack : BlockStack
    blocks : iterable of int
        Of those that are in the model now.
    what : str
        What cannot be done where one of them does not fit.
    batch : mapping or torch.Tensor, optional
        What to run a model on that cannot be probed otherwise, without padding.

    Raises
    ------
    UnsupportedSurgery
        If a block has not two branches, if a norm follows one of them, or if a projection is shared or quantised.
    """
    held: dict[int, dict[Branch, dict[str, nn.Parameter]]] = {}
    with called(stack, blocks, batch) as calls:
        for k, call in calls.items():
            found = branches_in(call)
            if isinstance(found, UnsupportedSurgery) or isinstance(call, UnsupportedSurgery):
                raise UnsupportedSurgery(f"{what}: block {k} cannot be divided: {found}", "branches")
            for branch in BRANCHES:
                paths = found.writers[branch]
                require_numbers(stack, k, paths)
                probe = BranchAlone(call, found, branch)
                values = probe.random(list(paths))
                halves = {path: value / 2 for path, value in values.items()}
                if not probe.equal(2 * probe.added(halves), probe.added(values)):
                    raise UnsupportedSurgery(
                        f"{what}: half the weights in the output projections of the {branch} of block {k} do not make "
                        "it add half as much (a norm follows it, as in Gemma 2 and 3).",
                        "scale",
                    )
                held.setdefault(k, {})[branch] = {path: call.block.get_parameter(path) for path in paths}
    return held


def divided(held: Held, factor: float) -> dict[int, dict[Branch, StandIns]]:
    """What stands in the place of output projections so that their branches add 1/factor of what they do."""

    def stand_ins(own: Mapping[str, nn.Parameter]) -> StandIns:
        return StandIns({path: stand_in_for(p, (p.detach() / factor)) for path, p in own.items()}, silent=False)

    return {k: {branch: stand_ins(own) for branch, own in branches.items()} for k, branches in held.items()}


def power_beyond(factor: float) -> float:
    """The power of two on a factor's side of 1 that is as far or farther: what it changes is no rounding.

    Examples
    --------
    >>> [power_beyond(factor) for factor in (1.3, 2, 2.1, 0.9, 0.3)]
    [2.0, 2.0, 4.0, 0.5, 0.25]
    """
    exponent = math.log2(factor)
    return 2.0 ** (math.ceil(exponent) if exponent > 0 else math.floor(exponent))


def answer(
    stack: BlockStack, batch: Batch | Tensor | None, factor: float = 1.0, before: nn.Module | None = None
) -> Tensor:
    """What a model says on the probe, or on a batch, with the state multiplied at one place.

    Parameters
    ----------
    stack : BlockStack
    batch : mapping or torch.Tensor, optional
    factor : float
    before : torch.nn.Module, optional
        The block whose own computation receives the multiplied state; by default it is multiplied behind the last.
    """
    model: Any = stack.model

    def enter(block: nn.Module, args: Any, kwargs: Any) -> Any:
        return write_input(args, kwargs, read_input(args, kwargs, block) * factor, block)

    def leave(block: nn.Module, args: Any, output: Any) -> Any:
        return write_output(output, read_output(output) * factor)

    scaled = list(stack.container.children())[-1] if before is None else before
    with undisturbed(model):
        if before is not None:
            handle = before.register_forward_pre_hook(enter, with_kwargs=True)
        else:
            handle = scaled.register_forward_hook(leave)
        try:
            if batch is not None:
                return read_output(model(**prepare(model, batch)))
            return logits_of_probe(model, given_to_probe(model, scaled))
        finally:
            handle.remove()


def same_answer(got: Tensor, wanted: Tensor) -> bool:
    """Whether two answers are equal up to rounding and the eps of norms."""
    return bool((got - wanted).abs().max() <= _TOLERANCE.get(wanted.dtype, 1e-3) * wanted.abs().max())
