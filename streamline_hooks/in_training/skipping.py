"""Run one forward of a model without some of its blocks, again and again, for little."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.read_hook import ChangeHook
from streamline_hooks.stack import BlockStack, find_stack, members
from streamline_hooks.surgery.copies import find_copies
from streamline_hooks.surgery.edits import Edits
from streamline_hooks.surgery.layout import Layout
from streamline_hooks.surgery.own_config import OwnConfigs
from streamline_hooks.surgery.renumber import shortened_config


class OwnBlocks(Edits):
    """The edits of a `LayerSurgeon` that only leaves blocks away, for many times.

    Each block is known, and needs no mark; what repeats the configuration is looked for once.
    """

    def __init__(self, configs: OwnConfigs) -> None:
        super().__init__(configs, uuid.uuid4().hex)
        self._numbers = {id(block): k for k, block in enumerate(self.stack.blocks)}
        self._described: list[Any] | None = None
        self._copying: list[nn.Module] = []

    def source(self, module: nn.Module) -> int | None:
        """The block's number."""
        return self._numbers[id(module)]

    def lay_out(self, *arranged: Any) -> None:
        """As `Edits.lay_out`; the first time, while the model has all blocks, look for what repeats a configuration."""
        if self._described is None:
            config, count, everything = self.stack.config, self.stack.count_attribute, range(len(self.stack))
            if config is not None and count is not None:
                names = {count, *shortened_config(config, count, len(everything), everything, self.stack.stage)}
                held = {name: vars(config)[name] for name in names if name in vars(config)}
                found = find_copies(self.stack, held, held, everything)
                self._copying = list(dict.fromkeys(module for module, _, _ in found))
            self._described = super()._descriptions()
        super().lay_out(*arranged)

    def _descriptions(self) -> list[Any]:
        return self._described or []

    def _copies(
        self, old: Mapping[str, Any], new: Mapping[str, Any], sources: Sequence[int]
    ) -> Iterator[tuple[nn.Module, str, Any]]:
        return find_copies(self.stack, old, new, sources, self._copying)


class Skipping:
    """Leave blocks out of a model and take them back, with everything that a removal changes.

    What a `LayerSurgeon` looks up when it opens is looked up once; a removal of single blocks then is one change.

    Parameters
    ----------
    model : torch.nn.Module
    stack : BlockStack
        Of this model.
    """

    def __init__(self, model: nn.Module, stack: BlockStack) -> None:
        self.model = model
        self._follow(stack)

    def _follow(self, stack: BlockStack) -> None:
        self.stack = stack
        self._configs = OwnConfigs(stack)
        self._edits = OwnBlocks(self._configs)

    def follow(self) -> bool:
        """Look at the stack anew where it has other blocks or another configuration by now; whether it has others."""
        same = members(self.stack.container) == self.stack.blocks
        if not same or not self.stack.has_its_config():
            self._follow(find_stack(self.model, self.stack.path))
        return not same

    def leave_out(self, blocks: Collection[int]) -> None:
        """Take blocks out; the model has all of them."""
        layout = Layout(list(self.stack.blocks))
        for k in blocks:
            layout.give_up(range(k, k + 1), None)
        try:
            self._configs.put_in()
            self._edits.lay_out(*layout.arrange())
        except BaseException:
            self.put_back()
            raise

    def put_back(self) -> None:
        """Give the model all its blocks, to the bit as they were; does no harm the second time."""
        try:
            self._close()
        except BaseException:  # Ctrl-C in the middle of it: every step can be done twice
            self._close()
            raise

    def _close(self) -> None:
        self._edits.close()
        self._configs.put_back(search=False)


class BeginHook(ChangeHook):
    """A pre-hook of a model, which must not be without effect where a replica runs in the model's place."""

    def __init__(self, watched: nn.Module | None = None, change: Callable[..., Any] | None = None) -> None:
        super().__init__(watched, change)
        self.is_live = change is not None

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Call what was given, unless it is a copy that runs."""
        if self.is_live and getattr(module, "_is_replica", False):
            raise StreamlineError(
                f"A replica of {type(module).__name__} is running (nn.DataParallel), from which no block can be "
                "skipped. Use DistributedDataParallel, or one device."
            )
        return super().__call__(module, *given)
