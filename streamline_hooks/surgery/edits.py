"""What a layout changes in a model, each change with its undoing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from streamline_hooks.offload import followed_device_map
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.capture import forget_capture_hooks, lend_capture_hooks, next_hook_id
from streamline_hooks.surgery.layout import NewSlot, Placed, names_of
from streamline_hooks.surgery.placement import move_beside
from streamline_hooks.surgery.renumber import find_index_attributes, same_descriptions, shortened_config
from streamline_hooks.surgery.saving import SavingRefused, savers
from streamline_hooks.surgery.splice import AFTER, BEFORE, Place, remember_splices, set_splices, spliced

ORIGIN = "_streamline_hooks_origin"
_MISSING = object()


class Edits:
    """Lay a stack out anew, and take it back.

    Each change first puts its own undoing on a list, so that whatever interrupts it can be followed by `revert`.

    Parameters
    ----------
    stack : BlockStack
        As it is before any change.
    token : str
        Under which the blocks carry their number, so that a copy made meanwhile says what it is a copy of.
    """

    def __init__(self, stack: BlockStack, token: str) -> None:
        self.stack = stack
        self.indices = find_index_attributes(stack.blocks)
        self._token = token
        self._origins: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._undoing: list[Callable[[], None]] = []
        self._first_hook = next_hook_id()

    def forget(self) -> None:
        """Keep the changes for good."""
        self._undoing.clear()

    def close(self) -> None:
        """Take every change back, and the capture hooks that were installed meanwhile."""
        self.revert()
        forget_capture_hooks(self.stack.model, self._first_hook)

    def lay_out(self, slots: list[NewSlot], at_end: list[Placed]) -> None:
        """Make the model have these slots, with what runs before each and after the last.

        Parameters
        ----------
        slots : list of NewSlot
        at_end : list of Placed
            As `Layout.arrange` gives them. The model is as it was before any change.
        """
        container = self.stack.container
        forget_capture_hooks(self.stack.model, self._first_hook)
        original = list(container.named_children())

        def put_back() -> None:
            container._modules.clear()
            container._modules.update(original)

        for slot in slots:
            self.source(slot.module)
        self._undoing.append(put_back)
        container._modules.clear()
        names = names_of(original, [slot.module for slot in slots])
        container._modules.update({name: slot.module for name, slot in zip(names, slots, strict=True)})
        for k, slot in enumerate(slots):
            for index in self.indices:
                holder = index.holder(slot.module)
                if holder is not None:
                    self._set(holder, index.name, index.of(k))
            self._splice(slot.module, BEFORE, slot.before)
            self._splice(slot.module, AFTER, at_end if k == len(slots) - 1 else [])
            if slot.module not in self.stack.blocks:
                move_beside(slot.module, self.stack.blocks[0])
                self._undoing += [h.remove for h in lend_capture_hooks(self.stack.blocks[0], slot.module)]
        self._shorten_config(slots)
        self._follow_device_map([name for name, _ in original], names, slots)
        for owner in savers(self.stack):
            self._set(owner, "save_pretrained", SavingRefused(owner))

    def _splice(self, block: nn.Module, place: Place, placed: list[Placed]) -> None:
        modules = [module for module, _, _ in placed]
        if list(spliced(block, place)) == modules:
            return
        for module in modules:
            move_beside(module, block)
        self._undoing.append(remember_splices(block, place))
        set_splices(block, place, modules)

    def _shorten_config(self, slots: list[NewSlot]) -> None:
        config, count = self.stack.config, self.stack.count_attribute
        if config is None or count is None:
            return
        sources = [self.source(slot.module) for slot in slots]
        for described in same_descriptions(self.stack):
            for name, value in shortened_config(described, count, len(self.stack), sources).items():
                if vars(described).get(name, _MISSING) != value:
                    self._set(described, name, value)

    def _follow_device_map(self, old: list[str], new: list[str], slots: list[NewSlot]) -> None:
        sources = [self.source(slot.module) for slot in slots]
        blocks = [
            (name, None if source is None else old[source], slot.module)
            for name, source, slot in zip(new, sources, slots, strict=True)
        ]
        for depth, owner in enumerate(self.stack.ancestors):
            device_map = vars(owner).get("hf_device_map")
            if device_map is not None:
                path = ".".join(self.stack.path.split(".")[depth:])
                self._set(owner, "hf_device_map", followed_device_map(device_map, path, old, blocks))

    def source(self, module: nn.Module) -> int | None:
        """Whose per-layer settings a block in a slot has: its own, or those of the block that it is a copy of."""
        marked = vars(module).get(ORIGIN, {}).get(self._token)
        if marked is not None:
            return int(marked)
        origin = self._origins.get(module)
        if origin is None:  # a copy from before the surgery, by its own number; read once, since it is renumbered
            held = [(i, i.holder(module)) for i in self.indices]
            said = {(getattr(h, i.name) - i.first) / i.stride for i, h in held if h is not None}
            origin = int(said.pop()) if len(said) == 1 else -1
            self._origins[module] = origin
        return origin if 0 <= origin < len(self.stack) else None

    def _set(self, target: Any, name: str, value: Any) -> None:
        values = vars(target)
        held = values.get(name, _MISSING)

        def put_back() -> None:
            if held is _MISSING:
                values.pop(name, None)
            else:
                values[name] = held

        self._undoing.append(put_back)
        values[name] = value

    def revert(self) -> None:
        """Take every change back. Each step can be done twice, so that an interruption can be followed by another."""
        while self._undoing:
            self._undoing[-1]()
            self._undoing.pop()
