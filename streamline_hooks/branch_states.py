"""Read the residual stream before and after each branch of a block while a model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.block_call import BlockCall, Tap, tapped
from streamline_hooks.branches import BRANCHES, Branch, Branches, tolerance
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.hidden_state import read_input, read_output
from streamline_hooks.layouts import by_token
from streamline_hooks.wrapping import refuse_compiled

Receive = Callable[[int, Branch, Tensor, Tensor], None]


@contextmanager
def reading_branches(
    blocks: Mapping[int, nn.Module], found: Mapping[int, Branches], receive: Receive
) -> Iterator[None]:
    """Pass the states before and after each residual branch to `receive` while the blocks run, in evaluation mode.

    `receive` gets the block's number, the branch, and both states, (batch, tokens, features), and must not keep them.
    For parallel branches "after" is the entering state plus this branch alone. What was found on a few tokens is
    verified: in each block's first forward the state between the branches, and in every forward the sum of two parallel
    branches. A mismatch raises `UnsupportedSurgery`.
    """
    for block in blocks.values():
        refuse_compiled(block, "read the branches of")
    handles: list[RemovableHandle] = []
    try:
        for k, block in blocks.items():
            handles += _Reading(k, block, found[k], receive).hooks()
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reading:
    """One block being read."""

    def __init__(self, k: int, block: nn.Module, branches: Branches, receive: Receive) -> None:
        if not branches.taps:
            raise UnsupportedSurgery(
                f"The branches of block {k} cannot be read: no submodule of {type(block).__name__} is given the state "
                "between them, or returns what they add."
            )
        self.k, self.block, self.branches, self.receive = k, block, branches, receive
        self.passed: dict[Branch, Tensor] = {}
        self.before: Tensor | None = None
        self.given: tuple[Any, Any] | None = None
        self.checked = False

    def hooks(self) -> list[RemovableHandle]:
        paths = {tap.path for tap in self.branches.taps.values()}
        return [
            self.block.register_forward_pre_hook(self.enter, with_kwargs=True),
            *tapped(self.block, self.tap, paths),
            self.block.register_forward_hook(self.leave, prepend=True),
        ]

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.passed.clear()
        self.before = read_input(args, kwargs, block).detach().clone()  # some blocks work on it in place
        self.given = None if self.checked else copy.deepcopy((args, kwargs))

    def tap(self, tap: Tap, state: Tensor) -> None:
        for branch, wanted in self.branches.taps.items():
            if tap == wanted and self.before is not None:
                self.passed[branch] = state.detach().reshape(self.before.shape).clone()

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        before, after, passed = self.before, read_output(output).detach(), dict(self.passed)
        self.before = None  # what runs from here on is no part of the forward
        if before is None or set(passed) != set(self.branches.taps):
            raise UnsupportedSurgery(
                f"Block {self.k} did not run as it did when its branches were looked for: the state between them did "
                f"not pass {', '.join(tap.path for tap in self.branches.taps.values())}."
            )
        first = self.branches.first
        if first is None:
            states = {branch: (before, before + passed[branch]) for branch in BRANCHES}
            self.require_close(before + passed["attention"] + passed["mlp"], after)
        else:
            second = BRANCHES[1 - BRANCHES.index(first)]
            states = {first: (before, passed[first]), second: (passed[first], after)}
            if self.given is not None:
                zeros = {name: torch.zeros_like(block.get_parameter(name)) for name in self.branches.writers[second]}
                self.require_close(BlockCall(block, *self.given, after).run(before, zeros), passed[first])
        self.checked, self.given = True, None
        for branch, (entering, leaving) in states.items():
            self.receive(self.k, branch, by_token(entering, block), by_token(leaving, block))

    def require_close(self, made: Tensor, passed: Tensor) -> None:
        if not (made - passed).abs().max() <= tolerance(passed.dtype) * passed.abs().max():
            raise UnsupportedSurgery(
                f"Block {self.k} does not do on these tokens what it did when its branches were looked for: what "
                "passes between its branches is not what the block gives with the second one silent, or its two "
                "parallel branches do not add up to its output."
            )
