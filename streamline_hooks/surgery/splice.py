"""Modules that run between two blocks without taking a slot of their own.

A splice is a submodule of the block that follows it (of the last block, at the end of the stack) and is run by that
block's hook. No cache slot, mask or rotary choice depends on it, and it is saved, moved, sharded and offloaded with
its block. The hooks are module-level functions that find the splices on the block they are given, so that a deep
copy of a model runs its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import nested_like, padded, read_input, read_output, write_input, write_output

Place = Literal["spliced_before", "spliced_after"]
BEFORE: Place = "spliced_before"
AFTER: Place = "spliced_after"


def run_before(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the block's own computation receives the spliced modules' output."""
    state = run_splices(block, BEFORE, read_input(args, kwargs, block))
    return write_input(args, kwargs, state, block)


def run_after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: the spliced modules work on what the block returns."""
    return write_output(output, run_splices(block, AFTER, read_output(output)))


def spliced(block: nn.Module, place: Place) -> tuple[nn.Module, ...]:
    """The modules that are spliced before or after a block, in the order in which they run."""
    return tuple(block._modules.get(place) or ())  # type: ignore[arg-type]


def remember_splices(block: nn.Module, place: Place) -> Callable[[], None]:
    """Remember what is spliced before or after a block.

    Returns
    -------
    callable
        Puts it back as it was; hooks that others have added meanwhile stay.
    """
    children, hooks = block._modules, _hooks(block, place)
    held, hook_id, order = children.get(place), _hook_id(block, place), list(hooks)

    def put_back() -> None:
        present = _hook_id(block, place)
        if present is not None and present != hook_id:
            block._forward_pre_hooks_with_kwargs.pop(present, None)
            hooks.pop(present)  # last: by it a second try, after an interruption, knows that there is work left
        if hook_id is not None and present is None:
            hooks[hook_id] = _HOOKS[place]
            if place == BEFORE:
                block._forward_pre_hooks_with_kwargs[hook_id] = True
            for key in [*(k for k in order if k in hooks), *(k for k in list(hooks) if k not in order)]:
                hooks.move_to_end(key)
        if held is None:
            children.pop(place, None)
        else:
            children[place] = held

    return put_back


def set_splices(block: nn.Module, place: Place, modules: Sequence[nn.Module]) -> None:
    """Make these modules, and no others, the splices before or after a block.

    Their hook runs ahead of every other hook of the block, so that a recorder, whenever it was attached, sees the
    state after the splice.

    Parameters
    ----------
    block : torch.nn.Module
    place : {"spliced_before", "spliced_after"}
    modules : sequence of torch.nn.Module
        In the order in which they run; empty to take all away.
    """
    hook_id = _hook_id(block, place)
    if modules:
        held = block._modules[place] = nn.ModuleList(modules)
        held.training = block.training  # of the list alone: what is in it has a mode already
        if hook_id is None and place == BEFORE:
            block.register_forward_pre_hook(run_before, prepend=True, with_kwargs=True)
        elif hook_id is None:
            block.register_forward_hook(run_after, prepend=True)
        return
    block._modules.pop(place, None)
    if hook_id is not None:
        _hooks(block, place).pop(hook_id)
        block._forward_pre_hooks_with_kwargs.pop(hook_id, None)


_HOOKS: dict[Place, Callable[..., Any]] = {BEFORE: run_before, AFTER: run_after}


def _hooks(block: nn.Module, place: Place) -> OrderedDict[int, Any]:
    hooks: Any = block._forward_pre_hooks if place == BEFORE else block._forward_hooks
    return cast("OrderedDict[int, Any]", hooks)


def _hook_id(block: nn.Module, place: Place) -> int | None:
    return next((key for key, hook in _hooks(block, place).items() if hook is _HOOKS[place]), None)


def run_splices(block: nn.Module, place: Place, state: Tensor) -> Tensor:
    """Run what is spliced before or after a block on a state of shape (batch, tokens, features)."""
    modules = spliced(block, place)
    given, state = state, padded(state) if modules else state
    for module in modules:
        mapped = module(state)
        if mapped.shape != state.shape:
            raise StreamlineError(
                f"A spliced {type(module).__name__} returned the shape {tuple(mapped.shape)} for a state of shape "
                f"{tuple(state.shape)}; expected the same shape, (batch, tokens, features)."
            )
        state = mapped.to(given.dtype)  # under autocast a module may return less than the state had
    return nested_like(state, given)
