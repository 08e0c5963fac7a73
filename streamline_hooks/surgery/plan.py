"""What a surgery did, or is about to do: old block to new block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from streamline_hooks.errors import StreamlineError


@dataclass(frozen=True)
class Slot:
    """One block of the new stack.

    Attributes
    ----------
    source : int or None
        The block it is, in the numbering before the surgery; None for a block that was put in.
    module : str
        Its class.
    silenced : tuple of {"attention", "mlp"}
        Its branches that add nothing any more.
    folded : tuple of {"attention", "mlp"}
        Its branches with a map multiplied onto what they add.
    """

    source: int | None
    module: str
    silenced: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splice:
    """A module without a slot.

    Attributes
    ----------
    before : int
        The new block that it runs before; the number of new blocks for one that runs after the last.
    old_before : int
        The same place in the old numbering.
    replaces : tuple of int or None
        The half-open window of old blocks in whose place it stands, where it stands for one.
    module : str
        Its class.
    """

    before: int
    old_before: int
    replaces: tuple[int, int] | None
    module: str


@dataclass(frozen=True)
class SurgeryPlan:
    """Old blocks, new blocks, and what stands between them.

    Attributes
    ----------
    stack : str
        Path of the stack.
    old_length : int
        Number of blocks before the surgery.
    slots : tuple of Slot
        The new blocks, in order.
    splices : tuple of Splice
        The modules that run between them, in order.
    described : bool
        Whether a configuration counts the blocks, and so changes with them.
    dropped : tuple of str
        The classes of what an earlier surgery had put between the blocks of a window, or behind the last block, and
        that went with them.
    """

    stack: str
    old_length: int
    slots: tuple[Slot, ...]
    splices: tuple[Splice, ...] = ()
    described: bool = True
    dropped: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The old blocks that are still there, by new position."""
        return tuple(slot.source for slot in self.slots if slot.source is not None)

    @property
    def removed(self) -> tuple[int, ...]:
        """The old blocks that are gone."""
        return tuple(k for k in range(self.old_length) if k not in set(self.kept))

    @property
    def old_to_new(self) -> dict[int, int]:
        """The new number of each old block that is still there."""
        return {slot.source: new for new, slot in enumerate(self.slots) if slot.source is not None}

    @property
    def silenced(self) -> dict[int, tuple[str, ...]]:
        """The silenced branches of each old block that has any and is still there."""
        return {slot.source: slot.silenced for slot in self.slots if slot.source is not None and slot.silenced}

    @property
    def folded(self) -> dict[int, tuple[str, ...]]:
        """The folded branches of each old block that has any and is still there."""
        return {slot.source: slot.folded for slot in self.slots if slot.source is not None and slot.folded}

    def after(self, earlier: SurgeryPlan) -> SurgeryPlan:
        """One plan for two surgeries: this one, in the numbering from before an earlier one of the same stack.

        What the earlier one put between blocks stays in no window's place: the later one does not tell which it was.

        Raises
        ------
        StreamlineError
            If the earlier one left another stack than this one began with.

        Examples
        --------
        >>> first = SurgeryPlan("layers", 4, (Slot(0, "Block"), Slot(2, "Block"), Slot(3, "Block")))
        >>> second = SurgeryPlan("layers", 3, (Slot(0, "Block"), Slot(2, "Block")))
        >>> second.after(first).removed
        (1, 2)
        """
        if (earlier.stack, len(earlier.slots)) != (self.stack, self.old_length):
            raise StreamlineError(
                f"The earlier surgery left {len(earlier.slots)} blocks of {earlier.stack}, and this one began with "
                f"{self.old_length} of {self.stack}; give the one that came just before."
            )

        def place(k: int) -> int:
            behind = (slot.source for slot in earlier.slots[k:] if slot.source is not None)
            return next(behind, earlier.old_length)

        def end(k: int) -> int:
            ahead = (slot.source for slot in reversed(earlier.slots[:k]) if slot.source is not None)
            return next((source + 1 for source in ahead), 0)

        slots = []
        for slot in self.slots:
            was = Slot(None, slot.module) if slot.source is None else earlier.slots[slot.source]
            silenced, folded = {*was.silenced, *slot.silenced}, {*was.folded, *slot.folded}
            slots.append(Slot(was.source, slot.module, tuple(sorted(silenced)), tuple(sorted(folded))))
        splices = tuple(
            Splice(
                one.before,
                place(one.old_before),
                None if one.replaces is None else (place(one.replaces[0]), end(one.replaces[1])),
                one.module,
            )
            for one in self.splices
        )
        described, dropped = self.described and earlier.described, (*earlier.dropped, *self.dropped)
        return SurgeryPlan(self.stack, earlier.old_length, tuple(slots), splices, described, dropped)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        silenced, folded = (
            [[k, branch] for k, branches in marked.items() for branch in branches]
            for marked in (self.silenced, self.folded)
        )
        return {**asdict(self), "removed": list(self.removed), "silenced": silenced, "folded": folded}

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> SurgeryPlan:
        """The plan that `to_dict` wrote, from its JSON values.

        Raises
        ------
        StreamlineError
            If something of it is missing.

        Examples
        --------
        >>> plan = SurgeryPlan("model.layers", 2, (Slot(1, "Block", silenced=("attention",)),))
        >>> SurgeryPlan.from_dict(plan.to_dict()) == plan
        True
        """
        try:
            slots = [
                Slot(s["source"], s["module"], tuple(s.get("silenced", ())), tuple(s.get("folded", ())))
                for s in said["slots"]
            ]
            splices = [
                Splice(s["before"], s["old_before"], s["replaces"] and tuple(s["replaces"]), s["module"])
                for s in said["splices"]
            ]
            described, dropped = said.get("described", True), tuple(said.get("dropped", ()))
            return cls(said["stack"], said["old_length"], tuple(slots), tuple(splices), described, dropped)
        except (KeyError, TypeError) as error:
            raise StreamlineError(
                f"This is no plan of a surgery: {type(error).__name__}: {error}. Expected what SurgeryPlan.to_dict "
                "gives, as a committed model's configuration holds it under streamline_hooks.history."
            ) from error

    def __str__(self) -> str:
        lines = [f"{self.stack}: {self.old_length} blocks -> {len(self.slots)}"]
        for new, slot in enumerate([*self.slots, None]):
            for splice in self.splices:
                if splice.before == new:
                    window = splice.replaces
                    stands = f" in place of {window[0]} to {window[1] - 1}" if window else ""
                    lines.append(f"        -> {splice.module}{stands}")
            if slot is not None:
                old = "   new" if slot.source is None else f"{slot.source:6d}"
                without = f" without {' and '.join(slot.silenced)}" if slot.silenced else ""
                folded = f" with {' and '.join(slot.folded)} folded" if slot.folded else ""
                lines.append(f"{old}  -> {new}{without}{folded}")
        if self.removed:
            lines.append("removed: " + ", ".join(map(str, self.removed)))
        if self.dropped:
            lines.append(f"and of an earlier surgery: {', '.join(self.dropped)}")
        if not self.described:
            lines.append("no configuration counts these blocks: only their container and their own numbers change")
        return "\n".join(lines)
