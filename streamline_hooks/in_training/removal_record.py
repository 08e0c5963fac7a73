"""Record the removals of a training run in the model's own history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.plain_module import history_of as carried_by
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.saving import saver_depth

NOTE = "progressive_removal"
_FIRST = "first_since_the_start_of"  # trainings: where blocks were changed by hand before one's own first removal


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
    """What was committed on a stack, as the configuration of the model that is saved, or a plain module, carries it."""
    depth = saver_depth(stack)
    if depth is None:
        history = carried_by(stack.model)
    else:
        model: Any = stack.ancestors[depth]
        history = (getattr(getattr(model, "config", None), "streamline_hooks", None) or {}).get("history", [])
    return [entry for entry in history if _one_path(entry["stack"], stack.path)]


def removals_in(history: Sequence[dict[str, Any]], run: str) -> list[Removal]:
    """The removals of one training among what was committed, in order."""
    return [
        Removal(entry[NOTE]["step"], tuple(entry[NOTE]["blocks"]), SurgeryPlan.from_dict(entry))
        for entry in history
        if _is_of(entry, run)
    ]


def start_of(history: Sequence[dict[str, Any]], run: str) -> int:
    """How many surgeries were committed before a training started; all of them where nothing says that it did."""
    return next(
        (k for k, entry in enumerate(history) if _is_of(entry, run) or run in entry.get(_FIRST, ())), len(history)
    )


def remember_start(history: Sequence[dict[str, Any]], start: int, run: str) -> None:
    """Mark the first surgery since a training run's start with the run's name, so that the run can be resumed.

    `start` is the number of entries in the history when the run started.
    """
    if start < start_of(history, run):
        first = history[start]
        first[_FIRST] = [*first.get(_FIRST, ()), run]


def numbers_at_start(since: Sequence[dict[str, Any]], began: int, length: int) -> list[int | None]:
    """Return the index of each present block at the start of a training run, None for a block inserted since.

    `since` lists the surgeries committed since then; `began` and `length` count the blocks then and now.
    """
    numbers: list[int | None] = list(range(began))
    for plan in (SurgeryPlan.from_dict(entry) for entry in since):
        _require(len(numbers), plan.old_length)
        numbers = [None if slot.source is None else numbers[slot.source] for slot in plan.slots]
    _require(len(numbers), length)
    return numbers


def _require(said: int, there: int) -> None:
    if said != there:
        raise StreamlineError(
            f"By the surgeries committed since the training started this model has {said} blocks, where {there} were "
            "found. Change blocks only by a LayerSurgeon with commit() on the model that ProgressiveRemoval was given, "
            "and load a shortened model as its checkpoint has it: from_pretrained(checkpoint)."
        )


def _is_of(entry: dict[str, Any], run: str) -> bool:
    return bool((entry.get(NOTE) or {}).get("run") == run)


def _one_path(one: str, other: str) -> bool:
    """Whether two paths name one stack, seen from two of the modules around it."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
