"""Modules that run between two blocks without taking a slot.

A splice is a submodule of the block that follows it, or of the last block at the end of the stack, and runs in a hook
of that block. No cache slot, mask or rotary embedding depends on it, and it is saved, moved, sharded and offloaded with
its block. The hooks are module-level functions that look up the splices on the block that calls them, so that a deep
copy of a model runs its own splices.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import (
    nested_like,
    padded,
    read_input,
    read_output,
    write_input,
    write_output,
)

SplicePosition = Literal["spliced_before", "spliced_after"]
BEFORE: SplicePosition = "spliced_before"
AFTER: SplicePosition = "spliced_after"


def run_before(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the splices before a block on its input, as a forward pre-hook."""
    state = run_splices(block, BEFORE, read_input(args, kwargs, block))
    return write_input(args, kwargs, state, block)


def run_after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Run the splices after a block on its output, as a forward hook."""
    return write_output(output, run_splices(block, AFTER, read_output(output)))


def spliced(block: nn.Module, position: SplicePosition) -> tuple[nn.Module, ...]:
    """Return the splices before or after a block, in the order in which they run.

    Parameters
    ----------
    block : torch.nn.Module
        Block of a stack.
    position : {"spliced_before", "spliced_after"}
        Position relative to the block: ``BEFORE`` or ``AFTER``.

    Returns
    -------
    tuple of torch.nn.Module
        The splices; empty if there are none.

    Examples
    --------
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> with LayerSurgeon(model) as surgeon:
    ...     _ = surgeon.insert(1, nn.Identity())
    ...     spliced(model.model.layers[1], BEFORE)
    (Identity(),)
    """
    return tuple(block._modules.get(position) or ())  # type: ignore[arg-type]


def snapshot_splices(block: nn.Module, position: SplicePosition) -> Callable[[], None]:
    """Return a function that restores the current splices of a block and keeps hooks that are added later."""
    children, hooks = block._modules, _hooks(block, position)
    module_list, hook_id, order = children.get(position), _hook_id(block, position), list(hooks)
    other, names = AFTER if position == BEFORE else BEFORE, list(children)
    later_splices = children.get(other) if module_list is not None and other in names[names.index(position) :] else None
    reinsert = False  # stays true when an interrupted call is repeated

    def restore() -> None:
        nonlocal reinsert
        current_id = _hook_id(block, position)
        reinsert = reinsert or (hook_id is not None and current_id != hook_id)
        if current_id is not None and current_id != hook_id:
            block._forward_pre_hooks_with_kwargs.pop(current_id, None)
            hooks.pop(current_id)  # last, so that a repeated call after an interruption still finds work to do
        if hook_id is not None and reinsert:
            hooks[hook_id] = _HOOKS[position]
            if position == BEFORE:
                block._forward_pre_hooks_with_kwargs[hook_id] = True
            for key in [*(k for k in order if k in hooks), *(k for k in list(hooks) if k not in order)]:
                hooks.move_to_end(key)
        if module_list is None:
            children.pop(position, None)
        else:
            children[position] = module_list
            if later_splices is not None:  # restores the order of the state dict
                children.pop(other, None)
                children[other] = later_splices

    return restore


def set_splices(block: nn.Module, position: SplicePosition, modules: Sequence[nn.Module]) -> None:
    """Set the splices before or after a block, in the order in which they run. An empty sequence removes all.

    The hook of the splices runs before every other hook of the block, so that a recorder sees the state after the
    splices regardless of when it was attached.
    """
    hook_id = _hook_id(block, position)
    if modules:
        module_list = block._modules[position] = nn.ModuleList(modules)
        module_list.training = block.training  # of the list only: its modules keep their mode
        if hook_id is None and position == BEFORE:
            block.register_forward_pre_hook(run_before, prepend=True, with_kwargs=True)
        elif hook_id is None:
            block.register_forward_hook(run_after, prepend=True)
        return
    block._modules.pop(position, None)
    if hook_id is not None:
        _hooks(block, position).pop(hook_id)
        block._forward_pre_hooks_with_kwargs.pop(hook_id, None)


_HOOKS: dict[SplicePosition, Callable[..., Any]] = {BEFORE: run_before, AFTER: run_after}


def _hooks(block: nn.Module, position: SplicePosition) -> OrderedDict[int, Any]:
    hooks: Any = block._forward_pre_hooks if position == BEFORE else block._forward_hooks
    return cast("OrderedDict[int, Any]", hooks)


def _hook_id(block: nn.Module, position: SplicePosition) -> int | None:
    return next((key for key, hook in _hooks(block, position).items() if hook is _HOOKS[position]), None)


def _to_device_of(module: nn.Module, state: Tensor) -> Tensor:
    """Move a state to a splice: before the first block of another device, Accelerate has not moved it yet."""
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.is_meta or state.is_meta or parameter.device == state.device:
        return state
    return state.to(parameter.device)


def run_splices(block: nn.Module, position: SplicePosition, state: Tensor) -> Tensor:
    """Run the splices before or after a block on a state of shape (batch, tokens, features)."""
    modules = spliced(block, position)
    original, state = state, padded(state) if modules else state
    for module in modules:
        mapped = module(_to_device_of(module, state))
        if mapped.shape != state.shape:
            raise StreamlineError(
                f"A spliced {type(module).__name__} returned shape {tuple(mapped.shape)} for a state of shape "
                f"{tuple(state.shape)}. Expected the same shape, (batch, tokens, features). Correct its forward."
            )
        state = mapped.to(original.dtype)  # under autocast a module may return a lower precision
    return nested_like(state, original)
