"""Silence one residual branch of a block: its output projections are at zero, and nothing else changes.

The block keeps its slot, its cache entry and its number, so that no mask or rotary choice depends on it, and the
checkpoint is a plain one of its architecture. The projections are not overwritten: other parameters, of zeros, stand
in their place, and the very ones that were there come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.batch import Batch, prepare
from streamline_hooks.block_call import BlockCall, observe_calls
from streamline_hooks.branches import Branch, Branches, find_branches
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.hidden_state import read_output, write_output
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.exchange import require_own, require_plain, stand_in_for
from streamline_hooks.surgery.probe import NotRun, Truth, given_to_probe, logits_of_probe, observe_hooked, undisturbed
from streamline_hooks.surgery.saving import saver_depth
from streamline_hooks.surgery.splice import AFTER, BEFORE

Zeros = Mapping[str, nn.Parameter]  # by their path below the block


@contextmanager
def called(
    stack: BlockStack, blocks: Iterable[int], batch: Batch | Tensor | None = None
) -> Iterator[dict[int, BlockCall | UnsupportedSurgery]]:
    """Run a model as it is probed, and give what its blocks were called with.

    Inside, the model is in evaluation mode, without gradients and unseen by hooks, so that blocks can be run again.

    Parameters
    ----------
    stack : BlockStack
    blocks : iterable of int
        Of those that are in the model now.
    batch : mapping or torch.Tensor, optional
        What to run a model on that cannot be probed otherwise, without padding.

    Yields
    ------
    dict of int to BlockCall or UnsupportedSurgery
        As `observe_calls` gives it.

    Raises
    ------
    StreamlineError
        If the model has to be given a batch.
    """
    model: Any = stack.model
    blocks = list(blocks)
    if batch is None and saver_depth(stack) is None:
        raise StreamlineError(f"{_WHEN_RUN} {type(model).__name__} does not say on what; {_GIVE}.")
    with undisturbed(model):
        try:
            given = given_to_probe(model, next((stack[k] for k in blocks), None)) if batch is None else {}
            run = partial(logits_of_probe, model, given) if batch is None else partial(model, **prepare(model, batch))
            calls = observe_calls({k: stack[k] for k in blocks}, run)
        except NotRun as error:
            reason = f"{_WHEN_RUN} this {type(model).__name__} cannot be run without one ({error}); {_GIVE}."
            raise StreamlineError(reason) from error
        yield calls


_WHEN_RUN = "The branches of a block show when the model runs, and"
_GIVE = "give a batch of its input, without padding (batch=...)"


def branches_of(
    stack: BlockStack, blocks: Iterable[int], batch: Batch | Tensor | None = None
) -> dict[int, Branches | UnsupportedSurgery]:
    """Find the branches of blocks, on what the model is probed with.

    Parameters
    ----------
    stack, blocks, batch
        As for `called`.

    Returns
    -------
    dict of int to Branches or UnsupportedSurgery
        For each block its branches, or the error that says why it has none.

    Raises
    ------
    StreamlineError
        If the model has to be given a batch.
    """
    with called(stack, blocks, batch) as calls:
        return {k: branches_in(call) for k, call in calls.items()}


def branches_in(call: BlockCall | UnsupportedSurgery) -> Branches | UnsupportedSurgery:
    """The branches that a call of a block shows, what is spliced beside the block apart; or why there are none."""
    if isinstance(call, UnsupportedSurgery):
        return call
    try:
        return find_branches(call, apart=(BEFORE, AFTER))
    except UnsupportedSurgery as error:
        return error


def silent_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What is at zero of a module's own parameters, as `LayerSurgeon.silence` leaves output projections.

    A matrix, and vectors at zero beside one. Empty where every matrix holds something; a bias alone says nothing.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> len(silent_parameters(layer))
    0
    >>> _ = nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    >>> len(silent_parameters(layer))
    2
    """
    own = [p for p in module.parameters(recurse=False) if p.is_floating_point() and not p.is_meta]
    zero = [p for p in own if not bool(p.detach().any())]
    return zero if any(p.ndim > 1 for p in zero) else []


def silent_inside(module: nn.Module) -> set[int]:
    """The ``id`` of each parameter that `silent_parameters` finds in a module and those inside it."""
    return {id(parameter) for part in module.modules() for parameter in silent_parameters(part)}


def find_zeros(stack: BlockStack, k: int, branch: Branch, batch: Batch | Tensor | None) -> Zeros:
    """Make what stands in the place of a branch's output projections.

    Parameters
    ----------
    stack : BlockStack
    k : int
        A block that is in the model now.
    branch : {"attention", "mlp"}
    batch : mapping or torch.Tensor, optional
        As for `branches_of`.

    Returns
    -------
    mapping of str to torch.nn.Parameter
        Zeros, by the path of the parameter below the block.

    Raises
    ------
    UnsupportedSurgery
        If the block has not two branches, or a projection is shared with other parts of the model, or is of a kind
        (quantised) that zeros of its shape cannot stand in for.
    """
    found = branches_of(stack, [k], batch)[k]
    if isinstance(found, UnsupportedSurgery):
        text = f"The {branch} branch of block {k} cannot be silenced: {found} Choose another block."
        raise UnsupportedSurgery(text, "branches")
    paths = found.writers[branch]
    require_own(stack, k, paths, "silenced")
    return {path: _zeros_like(stack[k].get_parameter(path), k, path) for path in paths}


def observe_silenced(model: nn.Module, block: nn.Module, paths: Iterable[str]) -> Truth | None:
    """Run the model with the output of each projection thrown away, its parameters as they are.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model.
    block : torch.nn.Module
        A block that is in it.
    paths : iterable of str
        The projections' parameters, below the block.

    Returns
    -------
    Truth or None
        None where the model does not give the same twice, or cannot be run without a batch; a warning says so.
    """
    owners = {path.rpartition(".")[0] for path in paths}

    def attach() -> list[RemovableHandle]:
        return [block.get_submodule(owner).register_forward_hook(adds_nothing) for owner in owners]

    what = f"What is silenced in this {type(model).__name__} is not held against the model without it"
    return observe_hooked(model, attach, what, frames=4, runs=block)


def adds_nothing(module: nn.Module, args: Any, output: Any) -> Any:
    """Replace a module's output by zeros; a forward hook."""
    return write_output(output, torch.zeros_like(read_output(output)))


def _zeros_like(held: nn.Parameter, k: int, path: str) -> nn.Parameter:
    require_plain(held, k, path, "Zeros", "Silence branches before quantising.")
    return stand_in_for(held, torch.zeros_like(held))
