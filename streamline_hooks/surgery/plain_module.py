"""What a model that is no Transformers model carries of the surgeries that were committed to it.

It has no configuration that could hold the plans, so that they are an attribute of the module itself: a deep copy and
a pickle take them along. What they say is held against the model whenever it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.committed import history_entry
from streamline_hooks.surgery.edits import ORIGIN, RECORD
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.splice import BEFORE, spliced
from streamline_hooks.surgery.spliced_model import splice_entries

PLAIN_FORMAT = 1  # of what is written of such a model


@dataclass(frozen=True)
class Composed:
    """What all surgeries on one stack came to.

    Attributes
    ----------
    stack : str
        Path of the stack.
    old_length : int
        Number of blocks before the first surgery.
    slots : tuple of (int or None, str)
        Of each block that is there now the number that it had before the first surgery, None for one that was put in,
        and its class.
    splices : tuple of int
        How many modules run before each block, and last how many behind the last one.
    """

    stack: str
    old_length: int
    slots: tuple[tuple[int | None, str], ...]
    splices: tuple[int, ...]


def record_surgery(model: nn.Module, plan: SurgeryPlan, notes: dict[str, Any]) -> None:
    """Let a model carry what was done to it, beside what it carries already.

    Raises
    ------
    StreamlineError
        If the notes are no JSON values.
    """
    entry = history_entry(model, plan, notes, type(model).__name__)
    vars(model)[RECORD] = {"format": PLAIN_FORMAT, "history": [*history_of(model), entry]}


def history_of(model: nn.Module) -> list[dict[str, Any]]:
    """The surgeries that a plain module says were committed to it, in their order; none of a Transformers model."""
    carried: list[dict[str, Any]] = (vars(model).get(RECORD) or {}).get("history", [])
    return carried


def composed(plans: Sequence[SurgeryPlan]) -> list[Composed]:
    """Say what a history comes to, stack by stack.

    Raises
    ------
    StreamlineError
        If a plan does not begin where the one before ended, or one stack lies inside another.

    Examples
    --------
    >>> from streamline_hooks.surgery.plan import Slot
    >>> first = SurgeryPlan("blocks", 4, (Slot(0, "Block"), Slot(None, "Block"), Slot(3, "Block")))
    >>> second = SurgeryPlan("blocks", 3, (Slot(1, "Block"), Slot(2, "Block")))
    >>> composed([first, second])[0].slots
    ((None, 'Block'), (3, 'Block'))
    """
    found: dict[str, Composed] = {}
    for number, plan in enumerate(plans):
        before = found.get(plan.stack)
        if before is not None and len(before.slots) != plan.old_length:
            raise StreamlineError(
                f"The history does not fit together: surgery {number} begins with {plan.old_length} blocks in "
                f"{plan.stack}, and {len(before.slots)} were left there before it. The model was copied inside an open "
                "LayerSurgeon, or something else changed it: commit on the model itself, and copy it afterwards."
            )
        slots = [
            (slot.source, slot.module) if before is None or slot.source is None else before.slots[slot.source]
            for slot in plan.slots
        ]
        splices = tuple(sum(s.before == k for s in plan.splices) for k in range(len(slots) + 1))
        length = plan.old_length if before is None else before.old_length
        found[plan.stack] = Composed(plan.stack, length, tuple(slots), splices)
    for outer in found:
        for inner in found:
            if inner.startswith(f"{outer}."):
                raise StreamlineError(
                    f"The stacks {outer} and {inner} were both operated on, and one lies inside the other, so that a "
                    "checkpoint cannot say which blocks are which. Keep this model in memory, or operate on one of the "
                    "two."
                )
    return list(found.values())


def described_stacks(model: nn.Module) -> list[dict[str, Any]]:
    """Say for a checkpoint what is in the stacks of a model that were operated on.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    list of dict
        For each its path, the names of its blocks, and what is spliced beside them, as JSON values.

    Raises
    ------
    StreamlineError
        If no surgery was committed to the model, if it is not what the plans say, or if a spliced module is of a class
        that cannot be built again.
    """
    _require_settled(model)
    described = []
    for state in composed([SurgeryPlan.from_dict(entry) for entry in history_of(model)]):
        stack = find_stack(model, state.stack)
        held = [*(len(spliced(block, BEFORE)) for block in stack.blocks), _behind(stack)]
        if len(stack) != len(state.slots) or tuple(held) != state.splices:
            raise StreamlineError(
                f"{state.stack} of this {type(model).__name__} has {len(stack)} blocks and {sum(held)} spliced "
                f"modules; its last surgery left {len(state.slots)} and {sum(state.splices)}, at their places. "
                "Something else than LayerSurgeon changed it since. Commit all changes of the stack with a "
                "LayerSurgeon, then save."
            )
        entries = splice_entries(stack.blocks)
        for entry in entries:
            if "error" in entry:
                raise StreamlineError(entry["error"])
        names = [name for name, _ in stack.container.named_children()]
        described.append({"stack": state.stack, "blocks": names, "splices": entries})
    return described


def _behind(stack: BlockStack) -> int:
    """How many modules are spliced behind blocks, which only the last one may have."""
    return sum(len(spliced(block, "spliced_after")) for block in stack.blocks)


def _require_settled(model: nn.Module) -> None:
    """Raise unless a surgery was committed to a model itself, and none is open."""
    name = type(model).__name__
    if any(ORIGIN in vars(module) for module in model.modules()):
        raise StreamlineError(
            f"A LayerSurgeon is open on this {name}, or was when it was copied, and its exit would take back what is "
            "written now. Call surgeon.commit() first, and copy afterwards; or leave the context to have the original."
        )
    parts = [path for path, module in model.named_modules() if path and _was_operated_on(module)]
    if parts:
        raise StreamlineError(
            f"A surgery was committed to a part of this {name}, {parts[0]}, and the whole does not say what was done. "
            f"Save that part: save(model.{parts[0]}, ...); or open the LayerSurgeon on the whole model."
        )
    if not history_of(model):
        raise StreamlineError(
            f"{name} is no Transformers model, and no surgery was committed to it: there is nothing to write but its "
            "weights, which safetensors.torch.save_model does. Or commit first: "
            "`with LayerSurgeon(model) as surgeon: surgeon.commit()`."
        )


def _was_operated_on(module: nn.Module) -> bool:
    return RECORD in vars(module) or bool(getattr(getattr(module, "config", None), "streamline_hooks", None))
