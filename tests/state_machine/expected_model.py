"""What a model should compute after any surgery, worked out without the library.

The reference is a copy of the original model that is never operated on. A surgery is a list of entries: blocks of the
original, blocks that were put in, and modules without a slot. They are run by hand inside one forward of the copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Entry:
    """A module that runs in the stack.

    Attributes
    ----------
    module : torch.nn.Module
        The reference's own copy.
    source : int or None
        The original block whose mask, positions and per-layer settings it has; None for a module without a slot.
    added : bool
        Whether it is no block of the original.
    """

    module: nn.Module
    source: int | None
    added: bool = False


class Placed(NamedTuple):
    """An entry, its number when the surgeon opened, the boundary where it stands, and the window that it replaces."""

    entry: Entry
    number: int | None
    boundary: int
    window: tuple[int, int] | None = None


class Level:
    """The operations of one surgeon, in the numbering when it opened."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.slots: list[Entry] = []
        self.before: list[list[Entry]] = [[]]
        for entry in entries:
            if entry.source is None:
                self.before[-1].append(entry)
            else:
                self.slots.append(entry)
                self.before.append([])
        self.inserted: dict[int, list[tuple[Entry, int | None]]] = {k: [] for k in range(len(self) + 1)}
        self.windows: dict[int, tuple[int, tuple[Entry, int | None] | None, bool]] = {}
        self.zeroed: dict[int, tuple[str, ...]] = {}
        self.changed: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def is_changed(self) -> bool:
        """Whether the surgeon has done anything."""
        return bool(self.windows or self.zeroed or any(self.inserted.values()))

    def copy(self) -> Level:
        other = copy(self)
        other.inserted = {k: list(entries) for k, entries in self.inserted.items()}
        other.windows, other.zeroed, other.changed = dict(self.windows), dict(self.zeroed), dict(self.changed)
        return other

    def block(self, number: int) -> Entry:
        """Return block `number` as it is now: with its branches zeroed, where some are."""
        return self.changed.get(number, self.slots[number])

    def placed(self) -> list[Placed]:
        """Return what runs, in order."""
        found: list[Placed] = []
        k, end_replaced = 0, False

        def add(entry: Entry, number: int | None, boundary: int, window: tuple[int, int] | None = None) -> None:
            found.append(Placed(entry if number is None else self.block(number), number, boundary, window))

        while k < len(self):
            for entry in self.before[k]:
                add(entry, None, k)
            for entry, number in self.inserted[k]:
                add(entry, number, k)
            if k in self.windows:
                stop, replacement, same_function = self.windows[k]
                if replacement is not None:
                    add(*replacement, k, (k, stop))
                end_replaced = stop == len(self) and not same_function
                k = stop
            else:
                add(self.slots[k], k, k)
                k += 1
        for entry in [] if end_replaced else self.before[k]:
            add(entry, None, k)
        for entry, number in self.inserted[k]:
            add(entry, number, k)
        return found

    def numbers(self, leaving: Sequence[int] = ()) -> set[int]:
        """Return the numbers of the blocks that are in the model, when those of a window have left."""
        return {p.number for p in self.placed() if p.number is not None and p.number not in leaving}

    def insert(self, k: int, entry: Entry, number: int | None) -> Level | None:
        """Return the level after an insertion; None where it is impossible."""
        if any(start < k < stop for start, (stop, _, _) in self.windows.items()):
            return None
        other = self.copy()
        other.inserted[k].append((entry, number))
        return other

    def replace(
        self, start: int, stop: int, replacement: tuple[Entry, int | None] | None, same_function: bool = False
    ) -> Level | None:
        """Return the level with a window replaced, by nothing where `replacement` is None; None where impossible."""
        if any(a < stop and start < b for a, (b, _, _) in self.windows.items()):
            return None
        if any(self.inserted[k] for k in range(start + 1, stop)):
            return None
        other = self.copy()
        other.windows[start] = (stop, replacement, same_function)
        return other if any(p.entry.source is not None for p in other.placed()) else None

    def zero_branch(self, number: int, branch: str, projections: Sequence[str]) -> Level:
        """Return the level with the output projections of a branch of a block at zero."""
        other = self.copy()
        if branch not in self.zeroed.get(number, ()):
            other.changed[number] = Entry(
                with_zeros(self.block(number).module, projections), self.slots[number].source, self.slots[number].added
            )
            other.zeroed[number] = tuple(sorted({*self.zeroed.get(number, ()), branch}))
        return other

    def every_entry(self) -> Iterator[Entry]:
        """Return all entries that can come back into the model."""
        yield from self.slots
        yield from self.changed.values()
        for entries in self.before:
            yield from entries
        yield from (p.entry for p in self.placed())


def owns_bias(block: nn.Module) -> bool:
    """Whether a block makes the relative position bias that a T5 hands to all others."""
    return any(name.endswith("relative_attention_bias") for name, _ in block.named_modules())


def with_zeros(block: nn.Module, projections: Sequence[str]) -> nn.Module:
    """Return a block that shares all parameters with another one but those of these projections, which are zero."""
    other = deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    for path in projections:
        module = other.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros_like(parameter), requires_grad=parameter.requires_grad))
    return other


@dataclass
class Reference:
    """The untouched model, and the levels of the surgeons that are open on the other one."""

    model: nn.Module
    path: str
    base: list[Entry] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = list(self.model.get_submodule(self.path).children())
        self.base = self.base or [Entry(block, k) for k, block in enumerate(self.blocks)]

    @property
    def entries(self) -> list[Entry]:
        """What runs now."""
        return [p.entry for p in self.levels[-1].placed()] if self.levels else self.base

    def committed(self) -> Reference:
        """Return a copy with what runs now as its original state."""
        base, model = deepcopy((self.entries, self.model))
        return Reference(model, self.path, base)

    def modules(self) -> list[nn.Module]:
        """Return all modules that follow what the user does to the model, those that are out of it included."""
        entries = [*self.base, *(entry for level in self.levels for entry in level.every_entry())]
        return [self.model, *{id(e): e.module for e in entries}.values()]

    def caller(self, entry: Entry) -> int:
        """Return the original block whose arguments a block gets.

        In a T5 only the first block makes the position bias; a copy of it elsewhere is handed that one.
        """
        first = next(e for e in self.entries if e.source is not None)
        return 1 if owns_bias(entry.module) and entry is not first else int(entry.source or 0)

    def run(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the logits, and the hidden states before the first entry and after each one."""
        calls: dict[int, tuple[Any, Any]] = {}
        states: list[Tensor] = []
        entries = self.entries

        def keep(k: int) -> Any:
            return lambda module, args, kwargs: calls.__setitem__(k, (args, kwargs))

        def finish(module: nn.Module, args: Any, output: Any) -> Any:
            state = calls[0][0][0]
            states.append(state)
            for entry in entries:
                if entry.source is None:
                    state = entry.module(state)
                else:
                    args, kwargs = calls[self.caller(entry)]
                    got = entry.module.forward(state, *args[1:], **kwargs)
                    state = got if isinstance(got, Tensor) else got[0]
                states.append(state)
            return state if isinstance(output, Tensor) else (state, *output[1:])

        handles = [b.register_forward_pre_hook(keep(k), with_kwargs=True) for k, b in enumerate(self.blocks)]
        handles.append(self.blocks[-1].register_forward_hook(finish))
        try:
            with torch.no_grad():
                logits = self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        return getattr(logits, "logits", logits), states
