"""Forward hooks that read or change what a module is given, and trackers built on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.batch import mask_of_call
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import read_input
from streamline_hooks.stack import BlockStack


class ReadHook:
    """A forward hook or pre-hook that calls `read` with its arguments after the module and returns nothing.

    It is inactive in copies of the `watched` module, which must not write into the original's records, and when
    gradient checkpointing runs a block again in the backward.
    """

    def __init__(self, watched: nn.Module | None = None, read: Callable[..., Any] | None = None) -> None:
        self._watched, self._read = watched, read

    def __call__(self, module: nn.Module, *given: Any) -> None:
        """Read, unless it is another module or a backward that runs."""
        if module is self._watched and self._read is not None and not in_backward():
            self._read(*given)

    def __reduce__(self) -> tuple[type[ReadHook], tuple[()]]:
        return type(self), ()


class ChangeHook(ReadHook):
    """A forward hook or pre-hook whose result replaces what it was given, also under gradient checkpointing."""

    def __init__(self, watched: nn.Module | None = None, change: Callable[..., Any] | None = None) -> None:
        super().__init__(watched, change)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Change, unless it is another module."""
        return self._read(*given) if module is self._watched and self._read is not None else None


def in_backward() -> bool:
    """Whether a backward runs, in which gradient checkpointing runs blocks once more; a compiler is told no."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class OutermostCall:
    """Tell a call of the outermost module from the calls inside it.

    The arguments of a call hold for what runs inside it, and for nothing that is called afterwards.
    """

    def __init__(self) -> None:
        self._running: nn.Module | None = None

    def hooks(self, modules: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Have the modules say themselves when their calls end."""
        self._running = None
        ends = [(module, ReadHook(module, partial(self.end, module))) for module in modules]
        return [module.register_forward_hook(end, always_call=True) for module, end in ends]

    def begins(self, module: nn.Module) -> bool:
        """Whether a module that is called now is called from outside."""
        if self._running not in (None, module):  # if it is the same, Ctrl-C has ended its call before
            return False
        self._running = module
        return True

    def end(self, module: nn.Module, *given: object) -> None:
        """The call of a module ends."""
        if self._running is module:
            self._running = None


class WatchedMask:
    """Read the mask of real tokens of one stack while the model is called, see `mask_of_call`.

    Each of several stacks has tokens of its own, so the mask is taken from the innermost model around the stack. `mask`
    is that of the last call, usually (batch, tokens); None if every token is real.
    """

    def __init__(self, stack: BlockStack) -> None:
        self.mask: Any = None
        self._stack = stack
        self._call = OutermostCall()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        called = [m for m in self._stack.ancestors if type(m).forward is not nn.Module.forward]  # a container is not
        self._handles += self._call.hooks(called)
        for module in called:
            self._handles.append(module.register_forward_pre_hook(self._called, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer = None if self._call.begins(module) else self.mask
        self.mask = mask_of_call(module, args, kwargs, None if _in_one_row(args, kwargs) else outer)


def _in_one_row(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a model gets input without a batch axis, such as the patches of all images (Qwen2-VL's vision tower)."""
    try:
        return read_input(args, kwargs).ndim == 2
    except StreamlineError:  # it is given token numbers
        return False
