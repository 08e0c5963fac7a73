"""The planned order of blocks and splices, in the numbering from before the surgery. No model is changed here."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from streamline_hooks.core import StreamlineError, describe_blocks, int_list
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices, spliced

# A module without a slot, the block (old index) that it runs before, and the window that it replaces.
Placed = tuple[nn.Module, int, tuple[int, int] | None]


@dataclass
class NewSlot:
    """A slot of the new stack, and the splices that run before it."""

    module: nn.Module
    before: list[Placed]


@dataclass
class StackLayout:
    """The planned surgery in the original numbering: insertions before each block, and removed windows."""

    blocks: list[nn.Module]
    inserted: dict[int, list[nn.Module]] = field(default_factory=dict)
    replaced_windows: dict[int, tuple[range, nn.Module | None]] = field(default_factory=dict)
    exchanged: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Splices of an earlier surgery keep their position, even if their block is removed.
        self.earlier = {k: list(spliced(b, BEFORE)) for k, b in enumerate(self.blocks) if spliced(b, BEFORE)}
        self.earlier_at_end = list(spliced(self.blocks[-1], AFTER))

    @property
    def earlier_modules(self) -> list[nn.Module]:
        """All splices of an earlier surgery, in order."""
        return [module for modules in (*self.earlier.values(), self.earlier_at_end) for module in modules]

    def copy(self) -> StackLayout:
        """Copy the layout, but not the modules, so that an operation can be tried on it."""
        other = copy.copy(self)
        other.inserted = {k: list(modules) for k, modules in self.inserted.items()}
        other.replaced_windows, other.exchanged = dict(self.replaced_windows), set(self.exchanged)
        return other

    def insert(self, k: int, module: nn.Module) -> None:
        """Insert a module before block k, after earlier insertions at this position."""
        self.inserted.setdefault(k, []).append(module)

    def require_boundary(self, k: int) -> None:
        """Raise `StreamlineError` if the position before block k is inside a removed window."""
        for window, _ in self.replaced_windows.values():
            if window.start < k < window.stop:
                raise StreamlineError(
                    f"The position before block {k} is inside the removed window of "
                    f"{describe_blocks(window)}. Choose {window.start} or {window.stop}."
                )

    def replace_window(self, window: range, module: nn.Module | None) -> None:
        """Replace a window by a module, or remove it."""
        for other, _ in self.replaced_windows.values():
            if other.start < window.stop and window.start < other.stop:
                raise StreamlineError(
                    f"The window of {describe_blocks(window)} overlaps the removed window of {describe_blocks(other)}. "
                    "Every index refers to the model when the surgeon opened. Choose other blocks."
                )
        inside = [k for k in self.inserted if window.start < k < window.stop]
        if inside:
            raise StreamlineError(
                f"The window of {describe_blocks(window)} contains the position before block {inside[0]}, at which "
                "a module was inserted. Remove the blocks on either side of it separately, in two calls."
            )
        self.replaced_windows[window.start] = (window, module)

    def exchange(self, k: int, module: nn.Module) -> None:
        """Replace block k by another block, and keep the splices of an earlier surgery after it."""
        self.replace_window(range(k, k + 1), module)
        self.exchanged.add(k)

    def copy_if_present(self, module: nn.Module, leaving: Sequence[int] = ()) -> nn.Module:
        """Return the module, or a copy if it would be in the model twice."""
        removed = {k for window, _ in self.replaced_windows.values() for k in window} | set(leaving)
        present = [block for k, block in enumerate(self.blocks) if k not in removed]
        present += [m for modules in self.inserted.values() for m in modules]
        present += [m for _, m in self.replaced_windows.values() if m is not None]
        if not any(m is module for m in (*present, *self.earlier_modules)):
            return module
        duplicate = copy.deepcopy(module)
        for position in (BEFORE, AFTER):  # the splices of the original block are not copied
            set_splices(duplicate, position, [])
        return duplicate

    def takes_slot(self, module: nn.Module) -> bool:
        """Whether a module is an instance of a class of the model's blocks."""
        return isinstance(module, tuple({type(block) for block in self.blocks}))

    def takes_slot_after(self, k: int) -> bool:
        """Whether a new block takes a slot after the position before block k."""
        later_modules = [m for start, (_, m) in self.replaced_windows.items() if start >= k and m is not None]
        later_modules += [m for position, modules in self.inserted.items() for m in modules if position > k]
        return any(self.takes_slot(module) for module in later_modules)

    def kept(self) -> list[int]:
        """Return the old indices of the blocks that are still in the stack, in their new order."""
        old = {id(block): k for k, block in enumerate(self.blocks)}
        return [old[id(slot.module)] for slot in self.arrange()[0] if id(slot.module) in old]

    def arrange(self) -> tuple[list[NewSlot], list[Placed]]:
        """Return the new slots with their splices, and the splices that run after the last slot.

        Splices of an earlier surgery run before those of this one. A replacement maps the input of the window's first
        block, after the splices there, to the output of its last block. Therefore earlier splices inside the window, or
        at the end of the stack, are removed with it, unless a block is only exchanged.
        """
        slots: list[NewSlot] = []
        waiting: list[Placed] = []

        def add_module(module: nn.Module, boundary: int, window: tuple[int, int] | None = None) -> None:
            nonlocal waiting
            if self.takes_slot(module):
                slots.append(NewSlot(module, waiting))
                waiting = []
            else:
                waiting.append((module, boundary, window))

        k, length, end_is_gone = 0, len(self.blocks), False
        while k < length:
            for module in [*self.earlier.get(k, []), *self.inserted.get(k, [])]:
                add_module(module, k)
            if k not in self.replaced_windows:
                add_module(self.blocks[k], k)
                k += 1
                continue
            window, replacement = self.replaced_windows[k]
            if replacement is not None:
                add_module(replacement, k, (window.start, window.stop))
            end_is_gone = window.stop == length and k not in self.exchanged
            k = window.stop
        for module in [*([] if end_is_gone else self.earlier_at_end), *self.inserted.get(length, [])]:
            add_module(module, length)
        return slots, waiting


def checked_window(window: Iterable[int], length: int) -> range:
    """Return a window as a half-open range, or raise if it is not consecutive or not within the stack."""
    indices = int_list(window, "window")
    if not indices or indices != list(range(max(indices[0], 0), min(indices[-1] + 1, length))):
        raise StreamlineError(
            f"window={indices} is not a window of the stack. Expected consecutive blocks from 0 to {length - 1}, "
            "numbered as when the surgeon opened. Pass a range such as range(3, 5), and call once for each window."
        )
    return range(indices[0], indices[-1] + 1)


def block_names(original: Sequence[tuple[str, nn.Module]], modules: Sequence[nn.Module]) -> list[str]:
    """Name the blocks in their container: by number, like the original ones (``layer_0``), or by their old names."""
    old = {id(module): name for name, module in original}
    prefix = original[0][0].removesuffix("0")
    if all(name == f"{prefix}{k}" for k, (name, _) in enumerate(original)):
        return [f"{prefix}{k}" for k in range(len(modules))]
    return [old.get(id(module), f"added_{k}") for k, module in enumerate(modules)]
