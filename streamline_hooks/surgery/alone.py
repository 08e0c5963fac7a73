"""One residual branch of a block, run without the other one and with other weights in its output projections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import BRANCHES, Branch, Branches, pattern_of, tolerance

_NO_OTHERS: Mapping[str, Tensor] = MappingProxyType({})


def run_alone(
    call: BlockCall, found: Branches, branch: Branch, state: Tensor, values: Mapping[str, Tensor] = _NO_OTHERS
) -> Tensor:
    """What a block gives on a state when its other branch is silent.

    Parameters
    ----------
    call : BlockCall
    found : Branches
        Of its block.
    branch : {"attention", "mlp"}
        The one that is not silent.
    state : torch.Tensor
        Of the shape of the call's own.
    values : mapping of str to torch.Tensor
        Other values of some parameters of the block.

    Returns
    -------
    torch.Tensor
        The state plus what the branch adds to it.
    """
    other = BRANCHES[1 - BRANCHES.index(branch)]
    return call.run(state, {**_zeros(call.block, found.writers[other]), **values})


class BranchAlone:
    """A branch on a random state, with random weights in some of its output projections and none in the others.

    What it is made of shows then whatever the model's own weights and states are: zeros, or states among which what a
    branch adds drowns in rounding.

    Parameters
    ----------
    call : BlockCall
    found : Branches
        Of its block.
    branch : {"attention", "mlp"}
    """

    def __init__(self, call: BlockCall, found: Branches, branch: Branch) -> None:
        self.call, self.found, self.branch = call, found, branch
        self._generator = torch.Generator().manual_seed(0)
        self.state = self._noise(call.state)
        precisions = {call.state.dtype} | {call.block.get_parameter(path).dtype for path in found.writers[branch]}
        self.tolerance = max(map(tolerance, precisions))

    def groups(self) -> list[list[str]]:
        """The branch's projections by what they do: those of all experts together."""
        groups: dict[tuple[str, torch.Size], list[str]] = {}
        for path in self.found.writers[self.branch]:
            shape = self.call.block.get_parameter(path).shape
            groups.setdefault((pattern_of(self.call.block, path), shape), []).append(path)
        return list(groups.values())

    def random(self, paths: list[str]) -> dict[str, Tensor]:
        """Random values with which these projections add about as much as the state is large."""
        values = {path: self._noise(self.call.block.get_parameter(path)) for path in paths}
        added = float(self.added(values).float().square().mean().sqrt())
        if not (math.isfinite(added) and added > 0):
            return values
        return {path: value * 2.0 ** -round(math.log2(added)) for path, value in values.items()}

    def added(self, values: Mapping[str, Tensor]) -> Tensor:
        """What the branch adds with these projections, and zeros in all its others."""
        zeros = _zeros(self.call.block, self.found.writers[self.branch])
        return run_alone(self.call, self.found, self.branch, self.state, {**zeros, **values}) - self.state

    def equal(self, made: Tensor, wanted: Tensor) -> bool:
        """Whether two things added are one up to rounding."""
        largest = max(float(self.state.abs().max()), float(wanted.abs().max()))
        return bool((made - wanted).abs().max() <= self.tolerance * largest)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator).to(like)


def _zeros(block: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    return {path: torch.zeros_like(block.get_parameter(path)) for path in paths}
