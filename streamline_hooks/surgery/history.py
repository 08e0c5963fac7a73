"""Record the surgeries committed to a plain PyTorch model, and replay them.

A model that is not a Transformers model has no configuration for the plans. They are stored in an attribute of the
module, so that a deep copy and a pickle keep them. The record is compared with the model whenever it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, permutations
from typing import TYPE_CHECKING, Any

from torch import nn

from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import find_stack
from streamline_hooks.surgery.commit import history_entry
from streamline_hooks.surgery.edits import ORIGIN, RECORD
from streamline_hooks.surgery.plan import SurgeryPlan
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced
from streamline_hooks.surgery.spliced_model import build_splices, splice_entries

if TYPE_CHECKING:
    from streamline_hooks.surgery.surgeon import LayerSurgeon

PLAIN_FORMAT = 1  # version of the description that is saved for such a model


@dataclass(frozen=True)
class CombinedPlan:
    """The result of all surgeries on one stack."""

    stack: str
    """Path of the stack."""
    old_length: int
    """Number of blocks before the first surgery."""
    slots: tuple[tuple[int | None, str], ...]
    """For each block: its index before the first surgery, or None for a new block, and its class name."""
    splices: tuple[int, ...]
    """Number of splices before each block, and finally after the last block."""


def record_surgery(model: nn.Module, plan: SurgeryPlan, notes: dict[str, Any]) -> None:
    """Append a surgery to the record of a model."""
    entry = history_entry(model, plan, notes, type(model).__name__)
    vars(model)[RECORD] = {"format": PLAIN_FORMAT, "history": [*committed_surgeries(model), entry]}


def committed_surgeries(model: nn.Module) -> list[dict[str, Any]]:
    """Return the surgeries recorded on a plain PyTorch model, in order; empty for a Transformers model."""
    carried: list[dict[str, Any]] = (vars(model).get(RECORD) or {}).get("history", [])
    return carried


def surgery_records(model: nn.Module) -> list[dict[str, Any]]:
    """Return the entries for the surgeries of any model, in order, as the next checkpoint will contain them."""
    description: dict[str, Any] = getattr(getattr(model, "config", None), "streamline_hooks", None) or {}
    return description.get("history", []) or committed_surgeries(model)


def combine_plans(plans: Sequence[SurgeryPlan]) -> list[CombinedPlan]:
    """Combine a history of surgeries into one plan for each stack.

    Raise `StreamlineError` if a plan does not start where the previous one ended, or one stack lies inside another.
    """
    combined: dict[str, CombinedPlan] = {}
    for number, plan in enumerate(plans):
        previous = combined.get(plan.stack)
        if previous is not None and len(previous.slots) != plan.old_length:
            raise StreamlineError(
                f"The history is inconsistent: surgery {number} begins with {plan.old_length} blocks in {plan.stack}, "
                f"but {len(previous.slots)} were left there before it. The model was copied inside an open "
                "LayerSurgeon, or changed by other code. Commit on the model itself, and copy it afterwards."
            )
        slots = [
            (slot.source, slot.module) if previous is None or slot.source is None else previous.slots[slot.source]
            for slot in plan.slots
        ]
        splices = tuple(sum(s.before == k for s in plan.splices) for k in range(len(slots) + 1))
        length = plan.old_length if previous is None else previous.old_length
        combined[plan.stack] = CombinedPlan(plan.stack, length, tuple(slots), splices)
    for outer, inner in permutations(combined, 2):
        if inner.startswith(f"{outer}."):
            raise StreamlineError(
                f"The stacks {outer} and {inner} were both changed, and one lies inside the other, so a checkpoint "
                "cannot identify their blocks. Keep this model in memory, or change only one of the two stacks."
            )
    return list(combined.values())


def describe_stacks(model: nn.Module) -> list[dict[str, Any]]:
    """Return the path, block names and splices of each changed stack, as JSON values for a checkpoint.

    Raise `StreamlineError` if no surgery was committed to the model, if the model does not match the plans, or if a
    spliced module is of a class that cannot be rebuilt.
    """
    _require_committed(model)
    described = []
    for state in combine_plans([SurgeryPlan.from_dict(entry) for entry in committed_surgeries(model)]):
        stack = find_stack(model, state.stack)
        at_end = sum(len(spliced(block, AFTER)) for block in stack.blocks)  # only the last block can have any
        splice_counts = [*(len(spliced(block, BEFORE)) for block in stack.blocks), at_end]
        if len(stack) != len(state.slots) or tuple(splice_counts) != state.splices:
            raise StreamlineError(
                f"{state.stack} of this {type(model).__name__} has {len(stack)} blocks and {sum(splice_counts)} "
                f"spliced modules, but its last surgery left {len(state.slots)} and {sum(state.splices)}, or at other "
                "positions. Other code changed the stack since. Commit all changes of the stack with a LayerSurgeon, "
                "then save."
            )
        entries = splice_entries(stack.blocks)
        for entry in entries:
            if "error" in entry:
                raise StreamlineError(entry["error"])
        names = [name for name, _ in stack.container.named_children()]
        described.append({"stack": state.stack, "blocks": names, "splices": entries})
    return described


def _require_committed(model: nn.Module) -> None:
    """Raise unless a surgery was committed to the model itself and no surgeon is open on it."""
    name = type(model).__name__
    if any(ORIGIN in vars(module) for module in model.modules()):
        raise StreamlineError(
            f"A LayerSurgeon is open on this {name}, or was open when it was copied. Its exit would undo the changes "
            "that are saved now. Call surgeon.commit() first and copy the model afterwards, or leave the with "
            "statement to save the original."
        )
    parts = [
        path
        for path, module in model.named_modules()
        if path and (RECORD in vars(module) or getattr(getattr(module, "config", None), "streamline_hooks", None))
    ]
    if parts:
        raise StreamlineError(
            f"A surgery was committed to a part of this {name}, {parts[0]}, and the whole model has no record of it. "
            f"Save that part: save(model.{parts[0]}, ...). Or open the LayerSurgeon on the whole model."
        )
    if not committed_surgeries(model):
        raise StreamlineError(
            f"{name} is not a Transformers model, and no surgery was committed to it, so there are only weights to "
            "save. Use safetensors.torch.save_model, or commit first: "
            "`with LayerSurgeon(model) as surgeon: surgeon.commit()`."
        )


def replay_surgeries(
    surgeon: LayerSurgeon,
    state: CombinedPlan,
    splices: Sequence[Mapping[str, Any]],
    copy_block: Callable[[int, Sequence[int]], nn.Module],
) -> None:
    """Apply the combined result of several surgeries in a surgeon that is open on the original model.

    `splices` are `splice_entries`. For each new block, ``copy_block(slot, sources)`` returns a copy of one of the
    original blocks `sources`, which are sorted by likelihood. Raise `StreamlineError` if the model has another number
    of blocks, or the splices do not match the plans.
    """
    stack = surgeon.stack
    if len(stack) != state.old_length:
        raise StreamlineError(
            f"{state.stack} of this {type(surgeon.model).__name__} has {len(stack)} blocks, but the saved model had "
            f"{state.old_length} before its surgery. Build the model with {state.old_length} blocks."
        )
    *before, at_end = _build_splices(state, splices)
    pending: list[nn.Module] = []
    for number, (source, _) in enumerate(state.slots):
        pending += before[number]
        if source is None:
            pending.append(copy_block(number, _candidate_sources(state, number)))
            continue
        for module in pending:
            surgeon.insert(source, module, despite_hazards=True)
        pending = []
    for module in [*pending, *at_end]:
        surgeon.insert(state.old_length, module, despite_hazards=True)
    kept_sources = {source for source, _ in state.slots}
    removed = [k for k in range(state.old_length) if k not in kept_sources]
    for _, window in groupby(enumerate(removed), lambda pair: pair[1] - pair[0]):
        surgeon.remove([k for _, k in window], despite_hazards=True)


def _build_splices(state: CombinedPlan, entries: Sequence[Mapping[str, Any]]) -> list[list[nn.Module]]:
    """Build the modules before each block, and after the last one."""
    length = len(state.slots)
    positions: list[list[nn.Module]] = [[] for _ in range(length + 1)]
    for entry in entries:
        number, position = entry["block"], entry["place"]
        if (
            position not in (BEFORE, AFTER)
            or number not in range(length)
            or (position == AFTER and number != length - 1)
        ):
            raise StreamlineError(
                f"The splices of {state.stack} list a module {position} block {number}, but its {length} blocks have "
                "no such position. The file was changed since it was written. Save the model again."
            )
        positions[number if position == BEFORE else length].extend(build_splices(dict(entry)))
    splice_counts = tuple(map(len, positions))
    if splice_counts != state.splices:
        raise StreamlineError(
            f"The plans of {state.stack} have {sum(state.splices)} splices, but {sum(splice_counts)} are described, or "
            "at other positions. The file was changed since it was written. Save the model again."
        )
    return positions


def _candidate_sources(state: CombinedPlan, number: int) -> list[int]:
    """Return the blocks that a new block may be a copy of, beginning with the window that it replaces."""
    sources = [source for source, _ in state.slots]
    kept = [(k, source) for k, source in enumerate(sources[:number]) if source is not None]
    start = kept[-1][1] + number - kept[-1][0] if kept else number
    return [*range(start, state.old_length), *range(min(start, state.old_length))]
