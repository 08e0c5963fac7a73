"""Verify while a model runs that the input of each block is the output of the block before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import naming_remedy, parameter_name, possible_states, read_input, read_output
from streamline_hooks.read_hook import ReadHook
from streamline_hooks.stack import BlockStack


class StateFlow:
    """Check which argument of a block is the hidden state, by what the block before it returned.

    A block that is called with one possible hidden state is not looked at any further, and each block is compared
    until its argument has been verified once; tensors are compared by value only if they are different objects.

    Parameters
    ----------
    stack : BlockStack
    """

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        self._left: Tensor | None = None
        self._verified: set[int] = set()

    def hooks(self, blocks: Iterable[int]) -> Iterator[RemovableHandle]:
        """Register, one by one, the hooks that verify these blocks; for block 0, whose input no block made, block 1."""
        for k in sorted({max(k, 1) for k in blocks} & set(range(len(self._stack)))):
            before, block = self._stack[k - 1], self._stack[k]
            yield before.register_forward_hook(ReadHook(before, self._leave))
            enter = ReadHook(block, partial(self._enter, k))
            yield block.register_forward_pre_hook(enter, with_kwargs=True)

    def forget(self) -> None:
        """Let go of the tensor that is kept for the next block."""
        self._left = None

    def _leave(self, args: tuple[Any, ...], output: Any) -> None:
        if len(self._verified) < len(self._stack) and not torch.compiler.is_compiling():
            self._left = read_output(output)

    def _enter(self, k: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        left, self._left = self._left, None
        block = self._stack[k]
        if left is None or k in self._verified or "spliced_before" in block._modules:  # the state was changed there
            return
        state = read_input(args, kwargs, block)
        others = [(place, value) for place, value in possible_states(args, kwargs, left) if value is not state]
        if others and not _equal(state, left):
            for place, value in others:
                if _equal(value, left):
                    name = parameter_name(block, place) or place
                    raise StreamlineError(
                        f"Block {k} ({type(block).__name__}) of {self._stack.path} receives the output of block "
                        f"{k - 1} as {name!r}, which is not the argument that was read as its hidden state. "
                        f"{naming_remedy(block, name)}"
                    )
        self._verified.add(k)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.is_nested or other.is_nested:
        return False
    return torch.equal(one.detach().to(other), other.detach())
