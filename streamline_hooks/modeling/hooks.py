"""Provide forward hooks that read or change tensors of a module, and trackers of calls and masks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import StreamlineError, padding_mask_of_call
from streamline_hooks.modeling.block_stack import BlockStack
from streamline_hooks.modeling.hidden_state import read_input

_MODEL_HOOKS: list[Callable[..., Any]] = []


def part_of_model(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function or method as a hook that belongs to a model, such as a splice, and return it."""
    _MODEL_HOOKS.append(hook)
    return hook


def is_part_of_model(hook: object) -> bool:
    """Whether a hook was marked by `part_of_model`."""
    function = getattr(hook, "__func__", hook)
    return any(function is marked for marked in _MODEL_HOOKS)


class ReadHook:
    """Forward hook or pre-hook that passes its arguments, without the module, to `read`.

    The hook does nothing on copies of the `watched` module, so that copies do not add to the records of the original,
    and when gradient checkpointing runs a block again in the backward.
    """

    def __init__(self, watched: nn.Module | None = None, read: Callable[..., Any] | None = None) -> None:
        self._watched, self._read = watched, read

    def __call__(self, module: nn.Module, *values: Any) -> None:
        """Call `read`, unless the module is a copy or a backward is running."""
        if module is self._watched and self._read is not None and not in_backward():
            self._read(*values)

    def __reduce__(self) -> tuple[type[ReadHook], tuple[()]]:
        return type(self), ()


class ChangeHook(ReadHook):
    """Forward hook or pre-hook whose result replaces the input or output, also under gradient checkpointing."""

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        """Return the result of `read`, or None if the module is a copy."""
        return self._read(*values) if module is self._watched and self._read is not None else None


def in_backward() -> bool:
    """Whether a backward is running, in which gradient checkpointing runs blocks again; False while compiling."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class OutermostCall:
    """Distinguish the call of the outermost module from the calls inside it, and refuse overlapping threads."""

    def __init__(self) -> None:
        self._running: nn.Module | None = None
        self._thread = 0  # of the running call, or the only one that may call the model
        self._is_reserved = False

    @property
    def is_running(self) -> bool:
        """Whether a call has begun and has not ended. False when gradient checkpointing runs a block in the backward.

        Unlike `in_backward`, it is also correct in hooks that are compiled.
        """
        return self._running is not None

    def hooks(self, modules: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Register hooks that call `end` after each call of the modules, and return their handles."""
        self._running, self._is_reserved = None, False
        return [m.register_forward_hook(ReadHook(m, partial(self.end, m)), always_call=True) for m in modules]

    def reserve(self) -> None:
        """Refuse calls of other threads from now on, also between the calls of this thread."""
        self._thread, self._is_reserved = threading.get_ident(), True

    def begins(self, module: nn.Module) -> bool:
        """Whether the call of a module that begins now is the outermost; raises if another thread calls the model."""
        if not torch.compiler.is_compiling():
            thread = threading.get_ident()
            if thread != self._thread and (self._is_reserved or self._running is not None):
                raise StreamlineError(
                    f"{type(module).__name__} was called by a thread while another thread records its hidden states, "
                    "so that the states would be mixed. Expected one thread per model at a time. Wait for the other "
                    "thread, for example with a threading.Lock, or give each thread its own model: "
                    "copy.deepcopy(model)."
                )
            self._thread = thread
        if self._running not in (None, module):  # for the same module, its earlier call was interrupted
            return False
        self._running = module
        return True

    def end(self, module: nn.Module, *values: object) -> None:
        """Record the end of a module's call."""
        if not torch.compiler.is_compiling() and self._thread != threading.get_ident():
            return  # the call was refused
        if self._running is module:
            self._running = None


class WatchedMask:
    """Record the mask of real tokens of one stack while the model runs, see `padding_mask_of_call`.

    The mask is read from the innermost model around the stack, because the stacks of a model may have different tokens.
    `mask` belongs to the last call and usually has the shape (batch, tokens); it is None if all tokens are real.
    """

    def __init__(self, stack: BlockStack) -> None:
        self.mask: Any = None
        self._stack = stack
        self._call = OutermostCall()
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        called = [m for m in self._stack.ancestors if type(m).forward is not nn.Module.forward]  # without containers
        hooks = [m.register_forward_pre_hook(self._called, with_kwargs=True) for m in called]
        for handle in (*self._call.hooks(called), *hooks):
            self._hooks.enter_context(handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_outermost = self._call.begins(module)
        outer = None if is_outermost or _in_one_row(args, kwargs) else self.mask
        mask = padding_mask_of_call(module, args, kwargs, outer)
        # A dict of masks by attention type from an outer model (Gemma 4) marks future tokens, not padding.
        self.mask = mask if is_outermost or not isinstance(mask, dict) else None


def _in_one_row(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the input has no batch axis, such as the patches of all images in Qwen2-VL's vision tower."""
    try:
        return read_input(args, kwargs).ndim == 2
    except StreamlineError:  # token ids
        return False
