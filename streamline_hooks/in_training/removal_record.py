"""What a training has removed so far, as the model's own configuration tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.saving import saver_depth

NOTE = "progressive_removal"


@dataclass(frozen=True)
class Removal:
    """One removal that a training carried out.

    Attributes
    ----------
    step : int
        The optimiser step after which it was done.
    blocks : tuple of int or None
        The blocks, in the numbering that the model had when the training started; None for one that was put in since.
    plan : SurgeryPlan
        What was done, in the numbering that the model had just before.
    """

    step: int
    blocks: tuple[int | None, ...]
    plan: SurgeryPlan


def history_of(stack: BlockStack) -> list[dict[str, Any]]:
    """What was committed on a stack, by the configuration of the model that is saved; nothing without one."""
    depth = saver_depth(stack)
    model: Any = None if depth is None else stack.ancestors[depth]
    said = getattr(getattr(model, "config", None), "streamline_hooks", None) or {}
    return [entry for entry in said.get("history", ()) if _one_path(entry["stack"], stack.path)]


def removals_in(history: Sequence[dict[str, Any]], run: str) -> list[Removal]:
    """The removals of one training among what was committed, in order."""
    return [
        Removal(entry[NOTE]["step"], tuple(entry[NOTE]["blocks"]), SurgeryPlan.from_dict(entry))
        for entry in history
        if _is_of(entry, run)
    ]


def numbers_at_start(history: Sequence[dict[str, Any]], run: str, length: int) -> list[int | None]:
    """The number of each block that is there now when a training started, whatever was committed since.

    Parameters
    ----------
    history : sequence of dict
    run : str
        The training. It started just before its first removal; without one, now.
    length : int
        Blocks that are there now.

    Returns
    -------
    list of int or None
        None for a block that was put in meanwhile.

    Raises
    ------
    StreamlineError
        If the configuration speaks of another number of blocks than there are.
    """
    first = next((k for k, entry in enumerate(history) if _is_of(entry, run)), len(history))
    numbers: list[int | None] | None = None
    for entry in history[first:]:
        plan = SurgeryPlan.from_dict(entry)
        before = list(range(plan.old_length)) if numbers is None else numbers
        numbers = [None if slot.source is None else before[slot.source] for slot in plan.slots]
    if numbers is not None and len(numbers) != length:
        raise StreamlineError(
            f"The model has {length} blocks, and by what its configuration says was removed it has {len(numbers)}. "
            "Load the model from the checkpoint as it is: from_pretrained(checkpoint)."
        )
    return list(range(length)) if numbers is None else numbers


def _is_of(entry: dict[str, Any], run: str) -> bool:
    return bool((entry.get(NOTE) or {}).get("run") == run)


def _one_path(one: str, other: str) -> bool:
    """Whether two paths name one stack, seen from two of the modules around it."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
