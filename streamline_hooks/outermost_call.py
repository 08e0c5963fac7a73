"""Which call of a model's parts comes from outside."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.read_hook import ReadHook


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
