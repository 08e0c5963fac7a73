"""The plan of a surgery: the origin of each new block, and the splices between the blocks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from streamline_hooks.core import StreamlineError


@dataclass(frozen=True)
class Slot:
    """A block of the new stack.

    Attributes
    ----------
    source : int or None
        Index of the block before the surgery. None for a new block.
    module : str
        Name of the block's class.
    zeroed : tuple of {"attention", "mlp"}
        Zeroed branches of the block.
    folded : tuple of {"attention", "mlp"}
        Branches with a map multiplied into their output projections.

    Examples
    --------
    >>> Slot(3, "LlamaDecoderLayer", zeroed=("attention",)).source
    3
    """

    source: int | None
    module: str
    zeroed: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splice:
    """A module that runs between two blocks without taking a slot.

    Attributes
    ----------
    before : int
        New index of the block that follows the module. The number of new blocks if it runs after the last one.
    old_before : int
        The same position in the old numbering.
    replaces : tuple of int or None
        Half-open window of old blocks that the module replaces, if any.
    module : str
        Name of the module's class.

    Examples
    --------
    >>> Splice(3, 5, (3, 5), "LinearReplacement").replaces
    (3, 5)
    """

    before: int
    old_before: int
    replaces: tuple[int, int] | None
    module: str


@dataclass(frozen=True)
class SurgeryPlan:
    """The new blocks of a stack, their origin, and the splices between them.

    Attributes
    ----------
    stack : str
        Path of the stack.
    old_length : int
        Number of blocks before the surgery.
    slots : tuple of Slot
        New blocks, in order.
    splices : tuple of Splice
        Modules that run between the new blocks, in order.
    described : bool
        Whether a configuration contains the number of blocks, and is changed with it.
    dropped : tuple of str
        Class names of an earlier surgery's splices that were removed together with the blocks around them.

    Examples
    --------
    >>> plan = SurgeryPlan("layers", 3, (Slot(0, "Block"), Slot(2, "Block")))
    >>> plan.removed, plan.old_to_new
    ((1,), {0: 0, 2: 1})
    >>> print(plan)
    layers: 3 blocks -> 2
         0  -> 0
         2  -> 1
    removed: 1
    """

    stack: str
    old_length: int
    slots: tuple[Slot, ...]
    splices: tuple[Splice, ...] = ()
    described: bool = True
    dropped: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The old indices of the kept blocks, by new index."""
        return tuple(slot.source for slot in self.slots if slot.source is not None)

    @property
    def removed(self) -> tuple[int, ...]:
        """The old indices of the removed blocks."""
        return tuple(k for k in range(self.old_length) if k not in set(self.kept))

    @property
    def old_to_new(self) -> dict[int, int]:
        """The new index of each kept block, by old index."""
        return {slot.source: new for new, slot in enumerate(self.slots) if slot.source is not None}

    @property
    def zeroed(self) -> dict[int, tuple[str, ...]]:
        """The zeroed branches of the kept blocks, by old index."""
        return {slot.source: slot.zeroed for slot in self.slots if slot.source is not None and slot.zeroed}

    @property
    def folded(self) -> dict[int, tuple[str, ...]]:
        """The folded branches of the kept blocks, by old index."""
        return {slot.source: slot.folded for slot in self.slots if slot.source is not None and slot.folded}

    def after(self, earlier: SurgeryPlan) -> SurgeryPlan:
        """Combine this plan with an earlier one of the same stack into one plan.

        Splices of the earlier surgery are not included, because a later plan does not record which of them it kept.

        Parameters
        ----------
        earlier : SurgeryPlan
            Plan of the surgery just before this one.

        Returns
        -------
        SurgeryPlan
            A plan from the numbering before the earlier surgery to the numbering after this one.

        Raises
        ------
        StreamlineError
            If the earlier surgery did not produce the stack that this one started from.

        Examples
        --------
        >>> first = SurgeryPlan("layers", 4, (Slot(0, "Block"), Slot(2, "Block"), Slot(3, "Block")))
        >>> second = SurgeryPlan("layers", 3, (Slot(0, "Block"), Slot(2, "Block")))
        >>> second.after(first).removed
        (1, 2)
        """
        if (earlier.stack, len(earlier.slots)) != (self.stack, self.old_length):
            raise StreamlineError(
                f"The earlier surgery left {len(earlier.slots)} blocks of {earlier.stack}, but this one started with "
                f"{self.old_length} of {self.stack}. Pass the plan of the surgery just before this one."
            )

        def start(k: int) -> int:
            later_sources = (slot.source for slot in earlier.slots[k:] if slot.source is not None)
            return next(later_sources, earlier.old_length)

        def stop(k: int) -> int:
            earlier_sources = (slot.source for slot in reversed(earlier.slots[:k]) if slot.source is not None)
            return next((source + 1 for source in earlier_sources), 0)

        slots = []
        for slot in self.slots:
            earlier_slot = Slot(None, slot.module) if slot.source is None else earlier.slots[slot.source]
            zeroed, folded = {*earlier_slot.zeroed, *slot.zeroed}, {*earlier_slot.folded, *slot.folded}
            slots.append(Slot(earlier_slot.source, slot.module, tuple(sorted(zeroed)), tuple(sorted(folded))))
        splices = []
        for splice in self.splices:
            window = splice.replaces and (start(splice.replaces[0]), stop(splice.replaces[1]))
            splices.append(replace(splice, old_before=start(splice.old_before), replaces=window))
        described, dropped = self.described and earlier.described, (*earlier.dropped, *self.dropped)
        return SurgeryPlan(self.stack, earlier.old_length, tuple(slots), tuple(splices), described, dropped)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        zeroed, folded = (
            [[k, branch] for k, branches in branches_by_block.items() for branch in branches]
            for branches_by_block in (self.zeroed, self.folded)
        )
        slots = [
            {"source": slot.source, "module": slot.module, "silenced": slot.zeroed, "folded": slot.folded}
            for slot in self.slots
        ]
        values = {**asdict(self), "slots": slots}
        return {**values, "removed": list(self.removed), "silenced": zeroed, "folded": folded}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SurgeryPlan:
        """Rebuild a plan from the JSON values that `to_dict` returned.

        Raises
        ------
        StreamlineError
            If a value is missing.

        Examples
        --------
        >>> plan = SurgeryPlan("model.layers", 2, (Slot(1, "Block", zeroed=("attention",)),))
        >>> SurgeryPlan.from_dict(plan.to_dict()) == plan
        True
        """
        try:
            slots = tuple(
                Slot(**{"zeroed" if name == "silenced" else name: value for name, value in _tuples(slot).items()})
                for slot in values["slots"]
            )
            splices = tuple(Splice(**_tuples(splice)) for splice in values["splices"])
            described, dropped = values.get("described", True), tuple(values.get("dropped", ()))
            return cls(values["stack"], values["old_length"], slots, splices, described, dropped)
        except (AttributeError, KeyError, TypeError) as error:
            raise StreamlineError(
                f"These values are not a surgery plan: {type(error).__name__}: {error}. Expected the result of "
                "SurgeryPlan.to_dict. A committed model has it in its configuration, under streamline_hooks.history."
            ) from error

    def __str__(self) -> str:
        lines = [f"{self.stack}: {self.old_length} blocks -> {len(self.slots)}"]
        for new, slot in enumerate([*self.slots, None]):
            for splice in self.splices:
                if splice.before == new:
                    window = splice.replaces
                    replaced = f" in place of {window[0]} to {window[1] - 1}" if window else ""
                    lines.append(f"        -> {splice.module}{replaced}")
            if slot is not None:
                old = "   new" if slot.source is None else f"{slot.source:6d}"
                without = f" without {' and '.join(slot.zeroed)}" if slot.zeroed else ""
                folded = f" with {' and '.join(slot.folded)} folded" if slot.folded else ""
                lines.append(f"{old}  -> {new}{without}{folded}")
        if self.removed:
            lines.append("removed: " + ", ".join(map(str, self.removed)))
        if self.dropped:
            lines.append(f"removed splices of an earlier surgery: {', '.join(self.dropped)}")
        if not self.described:
            lines.append(
                "no configuration counts these blocks: only the container and the indices in the blocks change"
            )
        return "\n".join(lines)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
