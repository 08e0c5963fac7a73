"""Silence one residual branch of a block: its output projections are at zero, and nothing else changes.

The block keeps its slot, its cache entry and its number, so that no mask or rotary choice depends on it, and the
checkpoint is a plain one of its architecture. The projections are not overwritten: other parameters, of zeros, stand
in their place, and the very ones that were there come back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare
from streamline_hooks.block_call import BlockCall, observe_calls
from streamline_hooks.branches import BRANCHES, Branch, Branches, find_branches
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.hidden_state import read_output, write_output
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.probe import NotRun, Truth, cache_fits, logits_of_probe, same_logits, undisturbed
from streamline_hooks.surgery.saving import saver_depth
from streamline_hooks.surgery.splice import AFTER, BEFORE

Zeros = Mapping[str, nn.Parameter]  # by their path below the block


def require_branch(branch: str) -> Branch:
    """The name of a branch, or an error that lists them."""
    for known in BRANCHES:
        if branch == known:
            return known
    raise StreamlineError(f"A block has no branch {branch!r}; expected {' or '.join(map(repr, BRANCHES))}.")


def branches_of(
    stack: BlockStack, blocks: Iterable[int], batch: Batch | Tensor | None = None
) -> dict[int, Branches | UnsupportedSurgery]:
    """Find the branches of blocks, on the tokens of the probe.

    Parameters
    ----------
    stack : BlockStack
    blocks : iterable of int
        Of those that are in the model now.
    batch : mapping or torch.Tensor, optional
        What to run a model on that cannot be run on tokens alone, without padding.

    Returns
    -------
    dict of int to Branches or UnsupportedSurgery
        For each block its branches, or the error that says why it has none.

    Raises
    ------
    StreamlineError
        If the model has to be given a batch.
    """
    model: Any = stack.model

    def forward() -> None:
        if batch is None:
            logits_of_probe(model)
        else:
            model(**prepare(model, batch))

    if batch is None and saver_depth(stack) is None:
        raise StreamlineError(f"{_WHEN_RUN} {type(model).__name__} does not say on what; {_GIVE}.")
    with undisturbed(model):
        try:
            calls = observe_calls({k: stack[k] for k in blocks}, forward)
        except NotRun as error:
            reason = f"{_WHEN_RUN} this {type(model).__name__} cannot be run on tokens alone ({error}); {_GIVE}."
            raise StreamlineError(reason) from error
        return {k: _found(call) for k, call in calls.items()}


_WHEN_RUN = "The branches of a block show when the model runs, and"
_GIVE = "give a batch of its input, without padding (batch=...)"


def _found(call: BlockCall | UnsupportedSurgery) -> Branches | UnsupportedSurgery:
    if isinstance(call, UnsupportedSurgery):
        return call
    try:
        return find_branches(call, apart=(BEFORE, AFTER))
    except UnsupportedSurgery as error:
        return error


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
    block, paths = stack[k], found.writers[branch]
    _require_own(stack, k, block, paths)
    return {path: _zeros_like(block.get_parameter(path), k, path) for path in paths}


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
        None where the model does not give the same twice, or cannot be run on tokens alone; a warning says so.
    """
    with undisturbed(model):
        try:
            whole = logits_of_probe(model)
            reason = "" if same_logits(whole, logits_of_probe(model)) else "it does not give the same twice"
        except NotRun as error:
            reason = f"it cannot be run on tokens alone ({error})"
        if reason:
            what = (
                f"What is silenced in this {type(model).__name__} is not held against the model without it: {reason}."
            )
            warnings.warn(what, stacklevel=4)
            return None
        cached = cache_fits(model, whole)
        owners = {path.rpartition(".")[0] for path in paths}
        handles = [block.get_submodule(owner).register_forward_hook(_nothing) for owner in owners]
        try:
            return Truth(logits_of_probe(model), cached)
        finally:
            for handle in handles:
                handle.remove()


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    return write_output(output, torch.zeros_like(read_output(output)))


def _require_own(stack: BlockStack, k: int, block: nn.Module, paths: tuple[str, ...]) -> None:
    """Where a projection is a part of something else too, zeros would silence that as well, or not be saved."""
    own = {id(block.get_parameter(path)) for path in paths}
    names: dict[int, list[str]] = {}
    for name, parameter in stack.model.named_parameters(remove_duplicate=False):
        if id(parameter) in own:
            names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1:
            raise UnsupportedSurgery(
                f"No branch of block {k} can be silenced alone: {' and '.join(shared)} are one parameter. Untie them "
                "first, or choose another block."
            )


def _zeros_like(held: nn.Parameter, k: int, path: str) -> nn.Parameter:
    if type(held) is not nn.Parameter or type(held.data) is not Tensor or not held.is_floating_point():
        raise UnsupportedSurgery(
            f"Zeros cannot stand in for {path} of block {k}, which is a {type(held).__name__} of {held.dtype} "
            f"({type(held.data).__name__}). Silence branches before quantising."
        )
    zeros = nn.Parameter(torch.zeros_like(held), requires_grad=held.requires_grad)
    vars(zeros).update(vars(held))
    return zeros


class StandIn:
    """Zeros in the place of one parameter, put in and taken back."""

    def __init__(self, block: nn.Module, path: str, zeros: nn.Parameter) -> None:
        owner, _, self._name = path.rpartition(".")
        self._parameters: Any = block.get_submodule(owner)._parameters
        self._held: Any = self._parameters[self._name]
        self._zeros = zeros

    def put_in(self) -> None:
        """Let the block compute with zeros."""
        move_parameter(self._zeros, self._held)
        self._parameters[self._name] = self._zeros

    def put_back(self) -> None:
        """Give the block its parameter back, where the model is now; does no harm the second time."""
        move_parameter(self._held, self._parameters[self._name])
        self._parameters[self._name] = self._held


def move_parameter(parameter: nn.Parameter, beside: nn.Parameter) -> None:
    """Bring one of the two to where a ``model.to(...)`` has brought the other meanwhile."""
    if (parameter.device, parameter.dtype) != (beside.device, beside.dtype):
        parameter.data = parameter.data.to(device=beside.device, dtype=beside.dtype)
