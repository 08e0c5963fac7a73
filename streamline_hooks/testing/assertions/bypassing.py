"""The truth about a removal: every block runs, and what the window makes is thrown away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from streamline_hooks.hidden_state import read_input, write_output
from streamline_hooks.stack import find_stack


@contextmanager
def bypassing(
    model: nn.Module, window: range, module: nn.Module | None = None, *, stack: str | None = None
) -> Iterator[None]:
    """Let a window's output be its input, or what a module makes of that.

    Nothing but two plain hooks is needed, so that this owes nothing to what it is compared with.

    Parameters
    ----------
    model : torch.nn.Module
    window : range
        Consecutive blocks.
    module : torch.nn.Module, optional
        Maps (batch, tokens, features) to the same shape.
    stack : str, optional
        Path of the stack, see `find_stack`.
    """
    blocks = find_stack(model, stack)
    kept: dict[str, Tensor] = {}

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        kept["state"] = read_input(args, dict(kwargs)).clone()

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state = kept["state"]
        return write_output(output, state if module is None else module(state))

    handles = [
        blocks[window.start].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[window.stop - 1].register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
