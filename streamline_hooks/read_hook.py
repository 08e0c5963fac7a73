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
    """A forward hook or pre-hook that reads.

    A deep copy, an unpickled one, or one that shares the original's hooks must not write into the original's
    records. Gradient checkpointing runs a block once more during the backward; that is not another visit.

    Parameters
    ----------
    watched : torch.nn.Module, optional
        The module that the hook is registered on.
    read : callable, optional
        Given what the hook is given after the module; what it returns is not used.

    Examples
    --------
    >>> linear, seen = nn.Linear(2, 2), []
    >>> _ = linear.register_forward_hook(ReadHook(linear, lambda args, output: seen.append(output.shape)))
    >>> _ = linear(torch.zeros(3, 2))
    >>> seen
    [torch.Size([3, 2])]
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
    """A forward hook or pre-hook whose result takes the place of what it was given.

    It is called also where gradient checkpointing runs a block once more: what is run then must be what was run before.

    Examples
    --------
    >>> identity = nn.Identity()
    >>> _ = identity.register_forward_hook(ChangeHook(identity, lambda args, output: output + 1))
    >>> identity(torch.zeros(1))
    tensor([1.])
    """

    def __init__(self, watched: nn.Module | None = None, change: Callable[..., Any] | None = None) -> None:
        super().__init__(watched, change)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Change, unless it is another module."""
        return self._read(*given) if module is self._watched and self._read is not None else None


def in_backward() -> bool:
    """Whether a backward runs, in which gradient checkpointing runs blocks once more; a compiler is told no."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class OutermostCall:
    """Tells a call of the model, or of a part that is called by itself, from one inside it.

    What a call was given holds for what runs inside it, and for nothing that is called afterwards.

    Examples
    --------
    >>> inner = nn.Linear(2, 2)
    >>> outer, call = nn.Sequential(inner), OutermostCall()
    >>> call.begins(outer), call.begins(inner)
    (True, False)
    >>> call.end(outer)
    >>> call.begins(inner)
    True
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
    """The mask of real tokens that the blocks of one stack are run under, read while the model is called.

    Of a model with several stacks each has tokens of its own: a decoder's are not padded as the encoder's are, and a
    vision tower's are patches. So the mask is taken from the innermost model around the stack, see `mask_of_call`.

    Parameters
    ----------
    stack : BlockStack

    Attributes
    ----------
    mask : torch.Tensor or None
        Of the last call of the model; usually of shape (batch, tokens). None where every token is real.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[0, 5, 6], [7, 8, 9]])
    >>> with torch.no_grad(), WatchedMask(find_stack(model)) as watched:
    ...     output = model(ids, attention_mask=(ids > 0).long())
    >>> watched.mask.tolist()
    [[0, 1, 1], [1, 1, 1]]
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
    """Whether a model is given what has no axis for a batch, such as all images' patches in one row (Qwen2-VL's tower).

    A mask of (batch, tokens) around it speaks of something else then.
    """
    try:
        return read_input(args, kwargs).ndim == 2
    except StreamlineError:  # it is given token numbers
        return False
