"""How many blocks a target comes to, and which windows may be given up."""

from __future__ import annotations

import math
from collections.abc import Iterable

from streamline_hooks.errors import StreamlineError


def blocks_to_remove(target: int | float, length: int, slots: int = 0) -> int:
    """The number of blocks that a target comes to.

    Parameters
    ----------
    target : int or float
        A number of blocks, or a fraction of the blocks below 1; a fraction is rounded half up, to one at least.
    length : int
        The number of blocks of the stack.
    slots : int
        The slots that the replacement takes: that many more blocks must go for the stack to shrink by the target.

    Returns
    -------
    int
        The length of the window to remove.

    Raises
    ------
    StreamlineError
        If that is nothing, or everything.

    Examples
    --------
    >>> blocks_to_remove(0.25, 30), blocks_to_remove(8, 30, slots=1)
    (8, 9)
    """
    fraction = isinstance(target, float) and 0 < target < 1
    wanted = max(1, math.floor(target * length + 0.5)) if fraction else target
    everything_or_one = isinstance(target, float) and target == 1.0
    if (
        isinstance(wanted, bool)
        or everything_or_one
        or not math.isfinite(wanted)
        or wanted != int(wanted)
        or wanted < 1
    ):
        raise StreamlineError(
            f"remove={target!r} is nothing that can be removed; give a number of blocks (1 to {length - 1}) or a "
            "fraction of them (above 0, below 1)."
        )
    count = int(wanted) + slots
    if count >= length:
        raise StreamlineError(
            f"remove={target!r} comes to {count} of {length} blocks; at least one block must stay. Remove less."
        )
    return count


def protected_blocks(keep: Iterable[int], length: int) -> frozenset[int]:
    """The blocks that must stay, counted from the start.

    Parameters
    ----------
    keep : iterable of int
        Block numbers, negative ones counted from the end.
    length : int

    Raises
    ------
    StreamlineError
        If a number is out of range.
    """
    chosen = list(keep)
    for k in chosen:
        if not -length <= k < length:
            raise StreamlineError(f"keep={k} is out of range: the stack has {length} blocks, 0 to {length - 1}.")
    return frozenset(k % length for k in chosen)


def windows(length: int, size: int, protected: frozenset[int] = frozenset()) -> list[range]:
    """Every run of `size` consecutive blocks that holds no protected one.

    Raises
    ------
    StreamlineError
        If there is none.

    Examples
    --------
    >>> windows(4, 2, frozenset({0}))
    [range(1, 3), range(2, 4)]
    """
    every = [range(start, start + size) for start in range(length - size + 1)]
    free = [window for window in every if not protected & set(window)]
    if not free:
        listed = ", ".join(map(str, sorted(protected))) or "none"
        raise StreamlineError(
            f"No run of {size} consecutive blocks among {length} is free of the protected ones ({listed}). Remove "
            "less, or protect fewer."
        )
    return free
