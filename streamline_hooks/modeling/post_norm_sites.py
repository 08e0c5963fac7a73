"""Find the sites of a block that normalizes the residual stream after each branch, such as that of BERT.

Such a block computes m = N(x + A(x)) and z = P(m + M(m)) with norms N and P, so that A(x) and M(m) do not sum to its
change z - x. The contributions of its branches are the changes of the state, m - x and z - m. They contain the norms.
The search runs the block on a few tokens and verifies that

- a submodule returns m, and the block continues from any tensor r with which this output is replaced: its output then
  depends on r only, and that of a token not on other tokens;
- m does not depend on the output projections of M;
- m equals N(x + a) and z equals P(m + b), where a and b are outputs of submodules, and N and P are what the parts of
  the block compute with their output projections at zero: norms of one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from streamline_hooks.core import StreamlineError, UnsupportedSurgery
from streamline_hooks.modeling.block_call import BlockCall
from streamline_hooks.modeling.branch_sites import (
    BlockSites,
    Change,
    SiteSearch,
    changing,
    find_branch_sites,
    uncalled_children,
)
from streamline_hooks.modeling.branches import (
    BRANCHES,
    Branch,
    Branches,
    BranchSearch,
    find_branches,
    require_readable,
    root_mean_square,
)
from streamline_hooks.modeling.probe import SPLICES

_NORM_SCALE = 16.0  # a norm returns almost the same for this multiple of its input


def find_post_norm_sites(call: BlockCall, uncalled: tuple[str, ...] = ()) -> BlockSites:
    """Find the sites of a block that normalizes the state after its attention and after its MLP.

    Parameters
    ----------
    call : BlockCall
        A call without padding, in evaluation mode.
    uncalled : tuple of str
        See `uncalled_children`.

    Returns
    -------
    BlockSites

    Raises
    ------
    UnsupportedSurgery
        If the block computes something else.

    Examples
    --------
    >>> from streamline_hooks.modeling import find_stack, observe_blocks
    >>> from streamline_hooks.testing import tiny_model
    >>> with observe_blocks(find_stack(tiny_model("bert", blocks=2)), [0]) as calls:
    ...     find_post_norm_sites(calls[0]).branches["attention"].output
    'attention'
    """
    require_readable(call)
    with torch.no_grad():
        search = BranchSearch(call, (*SPLICES, *uncalled))
        search.require_repeatable()
        projections, unused = search.read_graph()
        writers = search.by_branch(search.roles_of(projections, unused))
        if search.order(projections, writers) != "attention":
            search.refuse("it normalizes the state, but its MLP does not read the result of its attention")
        return _PostNormSearch(call, Branches("attention", writers, {}), uncalled).block_sites(uncalled)


def block_sites_in(call: BlockCall | UnsupportedSurgery) -> BlockSites | UnsupportedSurgery:
    """Find the sites of a block, without its splices, from one call, or return the error.

    Children that the call did not run, such as a cross-attention, are not part of the block. Whoever reads the sites
    must refuse calls that run them.
    """
    if isinstance(call, UnsupportedSurgery):
        return call
    try:
        require_readable(call)
        uncalled = uncalled_children(call)
        return find_branch_sites(call, find_branches(call, (*SPLICES, *uncalled)), uncalled)
    except UnsupportedSurgery as error:
        with suppress(UnsupportedSurgery):
            require_readable(call)
            return find_post_norm_sites(call, uncalled_children(call))
        return error


class _PostNormSearch(SiteSearch):
    """The steps of `find_post_norm_sites`."""

    def block_sites(self, uncalled: tuple[str, ...]) -> BlockSites:
        self.output = self.run(self.state, BRANCHES)
        for path, state in reversed(self.outputs.items()):
            if state.shape == self.state.shape and state.dtype == self.state.dtype and self.is_boundary(path):
                self.boundary, self.middle = path, state
                paths = {branch: self.normed_path(branch) for branch in BRANCHES}
                self.inner = {branch: path for branch, path in paths.items() if path is not None}
                if len(self.inner) == len(BRANCHES):
                    sites = {branch: self.sites_of(branch) for branch in BRANCHES}
                    sites["attention"] = replace(sites["attention"], returns_state=True)
                    return BlockSites("attention", sites, uncalled, post_norm=True)
        self.search.refuse("no submodule returns the norm of the sum of its input and an output of its attention")

    def output_of(self, branch: Branch) -> tuple[str | None, float]:
        return (self.boundary if branch == "attention" else None), 1.0

    def is_boundary(self, path: str) -> bool:
        """Whether this output is all that the rest of the block reads, and the rest computes each token separately."""
        fixed = [self.noise(self.state, seed) for seed in (3, 4)]

        def rest(entering: Tensor, middle: Tensor) -> Tensor:
            return self.run(entering, BRANCHES, {(path, "output"): lambda state: middle.view(state.shape)})

        result, again = rest(self.state, fixed[0]), rest(self.other, fixed[0])
        size = root_mean_square(result)
        depends = root_mean_square(result - rest(self.state, fixed[1])) > 2 * self.tolerance * size
        separate = self.equal(_odd(rest(self.state, _other_even(fixed[0]))), _odd(result), size)
        _, states = self.observed(self.state, ("attention",), (path,))
        return (
            self.equal(result, again, size) and depends and separate and torch.equal(states[path], self.outputs[path])
        )

    def observed(
        self,
        state: Tensor,
        on: tuple[Branch, ...],
        paths: tuple[str, ...],
        changes: Mapping[tuple[str, str], Change] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output of the block and those of submodules, in the shape of its state."""
        states: dict[str, Tensor] = {}

        def observe(path: str, output: Tensor) -> None:
            states[path] = output.clone().view(self.state.shape)

        with ExitStack() as hooks:
            for path in paths:
                hooks.enter_context(changing(self.block.get_submodule(path), "output", partial(observe, path)))
            return self.run(state, on, changes), states

    def normed(self, branch: Branch, state: Tensor) -> Tensor:
        """Return what the part of the block with this branch computes of a state without the branch."""
        if branch == "attention":
            return self.observed(state, ("mlp",), (self.boundary,))[1][self.boundary]
        return self.run(self.state, ("attention",), {(self.boundary, "output"): lambda old: state.view(old.shape)})

    def is_norm(self, branch: Branch) -> bool:
        """Whether the part of the block without this branch normalizes each token."""
        state = self.noise(self.state, 3)
        result, scaled = (self.normed(branch, state * scale) for scale in (1.0, _NORM_SCALE))
        separate = self.equal(_odd(self.normed(branch, _other_even(state))), _odd(result), root_mean_square(result))
        same = bool((result - scaled).abs().max() <= 0.05 * result.abs().max())
        return same and separate and not torch.equal(result, state)

    def normed_path(self, branch: Branch) -> str | None:
        """Return the submodule whose output is added to the state before the norm."""
        before, after = (self.state, self.middle) if branch == "attention" else (self.middle, self.output)
        if not self.is_norm(branch):
            return None
        for path, output in reversed(self.outputs.items()):
            if output.shape[-1] != before.shape[-1] or output.numel() != before.numel() or output.dtype != before.dtype:
                continue
            added = output.view(before.shape)
            if root_mean_square(added) > self.tolerance * self.size and self.is_sum(branch, before, added, after):
                return path
        return None

    def is_sum(self, branch: Branch, before: Tensor, added: Tensor, after: Tensor) -> bool:
        return self.equal(self.normed(branch, before + added), after, root_mean_square(after))

    def fixes(self, branch: Branch, paths: tuple[str, ...]) -> bool:
        """Whether what the branch adds before the norm depends on the block's input only through these inputs."""
        state = self.inputs[paths[0]]
        if state.shape[:-1].numel() != self.state.shape[:-1].numel():
            return False
        fixed = [self.noise(state, seed) for seed in (3, 4)]
        inner = self.inner[branch]

        def added(entering: Tensor, replacement: Tensor) -> Tensor | None:
            """Return what is added, None if the replacement changes more than that."""
            changes: dict[tuple[str, str], Change] = {(path, "input"): lambda _: replacement for path in paths}
            output, states = self.observed(entering, BRANCHES, (inner, self.boundary), changes)
            middle = states[self.boundary]
            before, after = (entering, middle) if branch == "attention" else (middle, output)
            return states[inner] if self.is_sum(branch, before, states[inner], after) else None

        try:
            results = [added(self.state, fixed[0]), added(self.other, fixed[0]), added(self.state, fixed[1])]
        except StreamlineError:
            return False
        first, again, different = results
        if first is None or again is None or different is None:
            return False
        size = max(self.size, root_mean_square(first))
        return self.equal(first, again, size) and root_mean_square(first - different) > 2 * self.tolerance * size


def _odd(state: Tensor) -> Tensor:
    return state[..., 1::2, :]


def _other_even(state: Tensor) -> Tensor:
    """Return a state in which every second token is another."""
    other = state.clone()
    other[..., ::2, :] = other[..., ::2, :].flip(-1)
    return other
