"""Verify that the state that enters a block is the output of the previous block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import (
    BlockStack,
    ReadHook,
    candidate_states,
    declaration_advice,
    parameter_name,
    read_input,
    read_output,
)


class StateFlowCheck:
    """Verify that the argument read as a block's hidden state is the output of the previous block.

    A block is compared until it was verified once, and only if several of its arguments may be the state.
    """

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        self._left: Tensor | None = None
        self._verified: set[int] = set()

    def hooks(self, blocks: Iterable[int]) -> Iterator[RemovableHandle]:
        """Register and yield the hooks that verify these blocks; block 1 is verified instead of block 0."""
        for k in sorted({max(k, 1) for k in blocks} & set(range(len(self._stack)))):
            before, block = self._stack[k - 1], self._stack[k]
            yield before.register_forward_hook(ReadHook(before, self._leave))
            enter = ReadHook(block, partial(self._enter, k))
            yield block.register_forward_pre_hook(enter, with_kwargs=True)

    def release(self) -> None:
        """Release the output that is stored for the comparison with the next block."""
        self._left = None

    def _leave(self, args: tuple[Any, ...], output: Any) -> None:
        if len(self._verified) < len(self._stack) and not torch.compiler.is_compiling():
            self._left = read_output(output)

    def _enter(self, k: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        left, self._left = self._left, None
        block = self._stack[k]
        # A splice before the block changes the state, so it is not compared.
        if left is None or k in self._verified or "spliced_before" in block._modules:
            return
        state = read_input(args, kwargs, block)
        others = [(argument, value) for argument, value in candidate_states(args, kwargs, left) if value is not state]
        if others and not _equal(state, left):
            for argument, value in others:
                if _equal(value, left):
                    name = parameter_name(block, argument) or argument
                    raise StreamlineError(
                        f"Block {k} ({type(block).__name__}) of {self._stack.path} receives the output of block "
                        f"{k - 1} as {name!r}, but a different argument was read as its hidden state. "
                        f"{declaration_advice(block, name)}"
                    )
        self._verified.add(k)


def _equal(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    if first.shape != second.shape or first.is_nested or second.is_nested:
        return False
    return torch.equal(first.detach().to(second), second.detach())
