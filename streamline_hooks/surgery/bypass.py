"""Bypass a window of blocks: all blocks run, but the last one's output is replaced by the window's input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.modeling import find_stack, is_capture_hook, read_input, write_output


def bypass(
    first: nn.Module, last: nn.Module, replacement: Callable[[Tensor], Tensor] | None = None
) -> list[RemovableHandle]:
    """Register hooks that replace the output of block `last` by the input of block `first`.

    The output is replaced before Transformers captures it for ``output_hidden_states``. A model that uses the hidden
    states of its vision tower (LLaVA) therefore receives those of the bypassed tower.

    Parameters
    ----------
    first : torch.nn.Module
        First block of the window.
    last : torch.nn.Module
        Last block of the window; may be `first`.
    replacement : callable, optional
        Maps the input of the window, (batch, tokens, features), to its output. By default the identity.

    Returns
    -------
    list of torch.utils.hooks.RemovableHandle
        Handles that remove the hooks.

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
        entered[:] = [read_input(args, kwargs, block).clone()]  # some blocks modify their input in place

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not entered:
            return None
        return write_output(output, entered[0] if replacement is None else replacement(entered[0]))

    handles = [first.register_forward_pre_hook(enter, with_kwargs=True), last.register_forward_hook(leave)]
    hooks = cast("OrderedDict[int, Any]", last._forward_hooks)
    keys = list(hooks)
    capture_position = next((position for position, key in enumerate(keys) if is_capture_hook(hooks[key])), len(keys))
    for key in keys[capture_position:-1]:
        hooks.move_to_end(key)
    return handles


@contextmanager
def bypassing(
    model: nn.Module, window: range, module: nn.Module | None = None, *, stack: str | None = None
) -> Iterator[None]:
    """Bypass a window of blocks, or replace it by a module, inside a ``with`` statement.

    Parameters
    ----------
    model : torch.nn.Module
        Model that contains the stack of blocks. It stays the same apart from the hooks.
    window : range
        Half-open range of consecutive blocks.
    module : torch.nn.Module, optional
        Maps the input of the window, (batch, tokens, features), to its output. By default the identity.
    stack : str, optional
        Path of the stack; see `find_stack`.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model, tokens = tiny_model("llama"), torch.arange(6)[None]
    >>> with torch.no_grad(), bypassing(model, range(1, 2)):
    ...     tuple(model(tokens).logits.shape[:2])
    (1, 6)
    """
    blocks = find_stack(model, stack)
    before, after = bypass(blocks[window.start], blocks[window.stop - 1], module)
    with before, after:
        yield
