"""The truth about a removal: every block runs, and what the window makes is thrown away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from streamline_hooks.stack import find_stack
from streamline_hooks.surgery.bypass import bypass


@contextmanager
def bypassing(
    model: nn.Module, window: range, module: nn.Module | None = None, *, stack: str | None = None
) -> Iterator[None]:
    """Let a window's output be its input, or what a module makes of that.

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
    handles = bypass(blocks[window.start], blocks[window.stop - 1], module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
