"""Which tokens of a stack's states are real, in a model that has several stacks."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.batch import mask_of_call
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import read_input
from streamline_hooks.outermost_call import OutermostCall
from streamline_hooks.stack import BlockStack


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
