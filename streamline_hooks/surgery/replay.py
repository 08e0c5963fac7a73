"""Lay out a model that was built anew as one that was operated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.surgery.plain_module import Composed
from streamline_hooks.surgery.splice import AFTER, BEFORE
from streamline_hooks.surgery.spliced_model import build_splices
from streamline_hooks.surgery.surgeon import LayerSurgeon


def replay(
    surgeon: LayerSurgeon,
    state: Composed,
    splices: Sequence[Mapping[str, Any]],
    put_in: Callable[[int, Sequence[int]], nn.Module],
) -> None:
    """Do in an open surgeon what several surgeries came to.

    Parameters
    ----------
    surgeon : LayerSurgeon
        On the model as it was before the first of them.
    state : Composed
    splices : sequence of mapping
        What is spliced beside the blocks, as `splice_entries` describes it.
    put_in : callable
        Gives the block for a slot that is none of the original's: for the slot's number, and the original's blocks
        that it may be a copy of, the likeliest first.

    Raises
    ------
    StreamlineError
        If the model has another number of blocks, or the splices are not those that the plans speak of.
    """
    stack = surgeon.stack
    if len(stack) != state.old_length:
        raise StreamlineError(
            f"{state.stack} of this {type(surgeon.model).__name__} has {len(stack)} blocks; the one that was operated "
            f"on had {state.old_length} there. Build it with as many as it had before the surgery."
        )
    before, behind = _spliced(state, splices)
    waiting: list[nn.Module] = []
    for number, (source, _) in enumerate(state.slots):
        waiting += before[number]
        if source is None:
            waiting.append(put_in(number, list(_origins(state, number))))
            continue
        for module in waiting:
            surgeon.insert(source, module, despite_hazards=True)
        waiting = []
    for module in [*waiting, *behind]:
        surgeon.insert(state.old_length, module, despite_hazards=True)
    for window in _windows(state):
        surgeon.remove(window, despite_hazards=True)


def _spliced(
    state: Composed, entries: Sequence[Mapping[str, Any]]
) -> tuple[dict[int, list[nn.Module]], list[nn.Module]]:
    """The modules before each block, and behind the last one."""
    last = len(state.slots) - 1
    before: dict[int, list[nn.Module]] = {number: [] for number in range(len(state.slots))}
    behind: list[nn.Module] = []
    for entry in entries:
        number, place = entry["block"], entry["place"]
        if place not in (BEFORE, AFTER) or number not in before or (place == AFTER and number != last):
            raise StreamlineError(
                f"The splices of {state.stack} name a module {place} block {number}, and there is no such place in its "
                f"{last + 1} blocks. The file was changed since it was written; save the model again."
            )
        (before[number] if place == BEFORE else behind).extend(build_splices(dict(entry)))
    held = (*(len(before[number]) for number in range(last + 1)), len(behind))
    if held != state.splices:
        raise StreamlineError(
            f"{sum(state.splices)} modules are spliced beside the blocks of {state.stack} by its plans, and "
            f"{sum(held)} are described, or they are at other places. A repair is lost; save the model again."
        )
    return before, behind


def _origins(state: Composed, number: int) -> Iterator[int]:
    """The blocks that one which was put in may be a copy of: of the window in whose place it stands, then all."""
    sources = [source for source, _ in state.slots]
    kept_before = [k for k in range(number) if sources[k] is not None]
    first = (sources[kept_before[-1]] or 0) + 1 if kept_before else 0
    place = number - (kept_before[-1] + 1 if kept_before else 0)
    yield from range(first + place, state.old_length)
    yield from range(min(first + place, state.old_length))


def _windows(state: Composed) -> Iterator[range]:
    """The runs of blocks that are gone."""
    kept = {source for source, _ in state.slots}
    start: int | None = None
    for k in range(state.old_length + 1):
        gone = k < state.old_length and k not in kept
        if gone and start is None:
            start = k
        elif not gone and start is not None:
            yield range(start, k)
            start = None
