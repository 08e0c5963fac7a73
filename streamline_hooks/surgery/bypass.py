"""Bypass a window of blocks: every block runs, and what leaves the last one is what entered the first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.hidden_state import read_input, write_output
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery.capture import captures


def bypass(
    first: nn.Module, last: nn.Module, replacement: Callable[[Tensor], Tensor] | None = None
) -> list[RemovableHandle]:
    """Register the hooks that make the output of one block the input of another.

    The output is replaced before Transformers captures it for ``output_hidden_states``: a model that works with the
    states of its vision tower (LLaVA) is given those of the bypassed tower.

    Parameters
    ----------
    first, last : torch.nn.Module
        The first and the last block of a window.
    replacement : callable, optional
        Maps what enters the window to what leaves it; by default the identity.

    Returns
    -------
    list of torch.utils.hooks.RemovableHandle

    Examples
    --------
    >>> import torch
    >>> block = nn.Linear(2, 2)
    >>> handles = bypass(block, block)
    >>> block(torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    entered: list[Tensor] = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entered[:] = [read_input(args, kwargs, block).clone()]  # some blocks work on it in place

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not entered:
            return None
        return write_output(output, entered[0] if replacement is None else replacement(entered[0]))

    handles = [first.register_forward_pre_hook(enter, with_kwargs=True), last.register_forward_hook(leave)]
    hooks = cast("OrderedDict[int, Any]", last._forward_hooks)
    keys = list(hooks)
    behind = next((place for place, key in enumerate(keys) if captures(hooks[key])), len(keys))
    for key in keys[behind:-1]:
        hooks.move_to_end(key)
    return handles


@contextmanager
def bypassing(
    model: nn.Module, window: range, module: nn.Module | None = None, *, stack: str | None = None
) -> Iterator[None]:
    """Bypass a window of blocks inside a ``with`` statement; a module maps what enters the window, if it is given."""
    blocks = find_stack(model, stack)
    handles = bypass(blocks[window.start], blocks[window.stop - 1], module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
