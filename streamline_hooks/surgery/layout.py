"""What stands where after a surgery, in the numbering before it. Nothing here touches a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from streamline_hooks.arguments import whole_numbers
from streamline_hooks.errors import StreamlineError
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices, spliced

# A module without a slot, the block (old number) that it runs before, and the window in whose place it stands.
Placed = tuple[nn.Module, int, tuple[int, int] | None]


@dataclass
class NewSlot:
    """A slot of the new stack, and the modules without a slot that run before it."""

    module: nn.Module
    before: list[Placed]


@dataclass
class Layout:
    """The surgery in the original numbering: what stands before each block, and which windows are gone."""

    blocks: list[nn.Module]
    inserted: dict[int, list[nn.Module]] = field(default_factory=dict)
    given_up: dict[int, tuple[range, nn.Module | None]] = field(default_factory=dict)
    exchanged: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Splices of an earlier surgery stay where they are, whatever happens to the block that carries them.
        self.earlier = {k: list(spliced(b, BEFORE)) for k, b in enumerate(self.blocks) if spliced(b, BEFORE)}
        self.earlier_at_end = list(spliced(self.blocks[-1], AFTER))

    @property
    def earlier_modules(self) -> list[nn.Module]:
        """All splices of an earlier surgery, in their order."""
        return [module for modules in (*self.earlier.values(), self.earlier_at_end) for module in modules]

    def copy(self) -> Layout:
        """A layout to try an operation on."""
        other = copy.copy(self)
        other.inserted = {k: list(modules) for k, modules in self.inserted.items()}
        other.given_up = dict(self.given_up)
        other.exchanged = set(self.exchanged)
        return other

    def insert(self, k: int, module: nn.Module) -> None:
        """Put a module before block k, after those that are there."""
        for window, _ in self.given_up.values():
            if window.start < k < window.stop:
                raise StreamlineError(
                    f"Nothing can be inserted before block {k}: blocks {window.start} to {window.stop - 1} are gone. "
                    f"Insert at {window.start} or {window.stop}."
                )
        self.inserted.setdefault(k, []).append(module)

    def give_up(self, window: range, module: nn.Module | None) -> None:
        """Take a window out, with a module in its place or nothing."""
        for other, _ in self.given_up.values():
            if other.start < window.stop and window.start < other.stop:
                raise StreamlineError(
                    f"Blocks {window.start} to {window.stop - 1} overlap {other.start} to {other.stop - 1}, which are "
                    "gone already. Every number is that of the model when the surgeon opened."
                )
        inside = [k for k in self.inserted if window.start < k < window.stop]
        if inside:
            raise StreamlineError(
                f"Blocks {window.start} to {window.stop - 1} have a module inserted before block {inside[0]} between "
                "them; give up the blocks on either side of it apart."
            )
        self.given_up[window.start] = (window, module)

    def exchange(self, k: int, module: nn.Module) -> None:
        """Put a block in the place of block k that does the same: what an earlier surgery put behind it stays."""
        self.give_up(range(k, k + 1), module)
        self.exchanged.add(k)

    def unshared(self, module: nn.Module, leaving: Sequence[int] = ()) -> nn.Module:
        """The module, or a copy of it where it would stand in the model twice."""
        gone = {k for window, _ in self.given_up.values() for k in window} | set(leaving)
        present = [block for k, block in enumerate(self.blocks) if k not in gone]
        present += [m for modules in self.inserted.values() for m in modules]
        present += [m for _, m in self.given_up.values() if m is not None]
        present += self.earlier_modules
        if not any(m is module for m in present):
            return module
        duplicate = copy.deepcopy(module)
        for place in (BEFORE, AFTER):  # what is spliced beside a block is not part of it
            set_splices(duplicate, place, [])
        return duplicate

    def takes_slot(self, module: nn.Module) -> bool:
        """Whether a module is a block as the model's own are, or derives from one."""
        return isinstance(module, tuple({type(block) for block in self.blocks}))

    def takes_slots_behind(self, k: int) -> bool:
        """Whether a block was put in behind the place before block k.

        Raises
        ------
        StreamlineError
            If the place is inside a window that is gone.
        """
        for window, _ in self.given_up.values():
            if window.start < k < window.stop:
                raise StreamlineError(
                    f"There is no place before block {k}: blocks {window.start} to {window.stop - 1} are gone. Say "
                    f"{window.start} or {window.stop}."
                )
        behind = [m for start, (_, m) in self.given_up.items() if start >= k and m is not None]
        behind += [m for place, modules in self.inserted.items() for m in modules if place > k]
        return any(self.takes_slot(module) for module in behind)

    def arrange(self) -> tuple[list[NewSlot], list[Placed]]:
        """The new slots with what runs before each, and what runs after the last.

        Before block k run the splices of an earlier surgery, then what was inserted now. A window replaces everything
        from the state that its first block received (after the splices there) to the state that its last block
        handed on: splices of an earlier surgery between its blocks, or after the last of the stack, go with it; but
        not where a block is exchanged for another one.
        """
        slots: list[NewSlot] = []
        waiting: list[Placed] = []

        def place(module: nn.Module, boundary: int, window: tuple[int, int] | None = None) -> None:
            nonlocal waiting
            if self.takes_slot(module):
                slots.append(NewSlot(module, waiting))
                waiting = []
            else:
                waiting.append((module, boundary, window))

        k, length, end_is_gone = 0, len(self.blocks), False
        while k < length:
            for module in [*self.earlier.get(k, []), *self.inserted.get(k, [])]:
                place(module, k)
            if k not in self.given_up:
                place(self.blocks[k], k)
                k += 1
                continue
            window, stand_in = self.given_up[k]
            if stand_in is not None:
                place(stand_in, k, (window.start, window.stop))
            end_is_gone = window.stop == length and k not in self.exchanged
            k = window.stop
        for module in [*([] if end_is_gone else self.earlier_at_end), *self.inserted.get(length, [])]:
            place(module, length)
        return slots, waiting


def window_of(window: Iterable[int], length: int) -> range:
    """The half-open range of a window of blocks.

    Raises
    ------
    StreamlineError
        If it is empty, not consecutive, or out of range.
    """
    numbers = whole_numbers(window, "window")
    run = bool(numbers) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if not run or numbers[0] < 0 or numbers[-1] >= length:
        raise StreamlineError(
            f"window={numbers} is no window of the stack. Expected consecutive blocks out of 0 to {length - 1}, in the "
            "numbering from when the surgeon opened. Give a range such as range(3, 5); call once for each run."
        )
    return range(numbers[0], numbers[-1] + 1)


def names_of(original: Sequence[tuple[str, nn.Module]], modules: Sequence[nn.Module]) -> list[str]:
    """The names that blocks have in their container: numbered as the original ones are (``layer_0``), or kept."""
    old = {id(module): name for name, module in original}
    prefix = original[0][0].removesuffix("0")
    if all(name == f"{prefix}{k}" for k, (name, _) in enumerate(original)):
        return [f"{prefix}{k}" for k in range(len(modules))]
    return [old.get(id(module), f"added_{k}") for k, module in enumerate(modules)]
