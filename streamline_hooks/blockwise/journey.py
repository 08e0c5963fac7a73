"""Which blocks states go through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from streamline_hooks.errors import StreamlineError


class Journey(NamedTuple):
    """The way of some states through the blocks from `start` to before `stop`.

    Attributes
    ----------
    batch : int
        The batch of which masks, positions and all else are that the blocks are given beside the states.
    start, stop : int
        Places of the residual stream.
    """

    batch: int
    start: int
    stop: int


def journeys_of(batches: int, stop: int, ends: Sequence[int] | None, others: Sequence[Journey]) -> list[Journey]:
    """The batches' own ways, and then the others.

    Parameters
    ----------
    batches, stop : int
        How many there are, and the first block that is not run.
    ends : sequence of int, optional
        For each batch the first block that it does not go through; by default `stop`.
    others : sequence of Journey

    Raises
    ------
    StreamlineError
        If one of them is no way from a place to a later one, or to itself, up to `stop`.
    """
    found = [Journey(number, 0, end) for number, end in enumerate([stop] * batches if ends is None else ends)]
    found += others
    wrong = [way for way in found if not (0 <= way.batch < batches and 0 <= way.start <= way.stop <= stop)]
    if wrong or len(found) != batches + len(others):
        said = f"{wrong[0]} leads nowhere" if wrong else f"ends={list(ends or ())} is not one end for each batch"
        raise StreamlineError(f"{said}: there are {batches} batches, and {stop} blocks are run.")
    return found
