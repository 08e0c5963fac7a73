"""Single blocks by their own scores, all at once."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.search.selected import Scorer, Selection, scores_of
from streamline_hooks.selection.target import blocks_to_remove, protected_blocks


def one_shot(score: Scorer, length: int, count: int, *, keep: Iterable[int] = (), best: int = 1) -> list[Selection]:
    """Give up the blocks that score highest on their own (ShortGPT, arXiv 2403.03853, with Block Influence).

    Parameters
    ----------
    score : callable
        Scores a sequence of windows, here of one block each; the higher, the sooner one goes.
    length : int
        Number of blocks of the stack.
    count : int
        Blocks that go.
    keep : iterable of int
        Blocks that must stay, negative ones counted from the end.
    best : int
        How many selections to return; the second differs in one block from the first.

    Returns
    -------
    list of Selection
        The sets of blocks with the greatest sums, or all where there are fewer, the best first; ties go to the
        earlier blocks. Blocks next to each other are one window.

    Raises
    ------
    StreamlineError
        If there are too few blocks.

    Examples
    --------
    >>> influence = [9, 1, 2, 8, 0, 7]
    >>> one_shot(lambda windows: [-influence[w.start] for w in windows], 6, 3)[0].windows
    (range(1, 3), range(4, 5))
    """
    count, protected = blocks_to_remove(count, length), protected_blocks(keep, length)
    values = scores_of(score, [range(k, k + 1) for k in range(length) if k not in protected])
    if len(values) < count:
        raise StreamlineError(
            f"{count} of {length} blocks are to go, and only {len(values)} may: the others are protected, or score "
            "minus infinity. Remove less, or protect fewer."
        )
    alone = {window.start: value for window, value in values.items()}
    return [Selection.of_blocks(blocks, score=total) for total, blocks in best_sets(alone, count, best)]


def best_sets(values: Mapping[int, float], count: int, best: int) -> list[tuple[float, tuple[int, ...]]]:
    """The sets of so many numbers with the greatest sums of their values, the best first.

    Parameters
    ----------
    values : mapping of int to float
        In the order in which ties are broken.
    count : int
        Members of a set.
    best : int
        How many sets, or all where there are fewer.

    Returns
    -------
    list of (float, tuple of int)
        The sum and the members.
    """
    # sums[n]: the best sets of n of the numbers so far, as minus their sum and the numbers.
    sums: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())], *([] for _ in range(count))]
    for number, value in values.items():
        for n in range(count, 0, -1):
            longer = [(total - value, (*members, number)) for total, members in sums[n - 1]]
            sums[n] = heapq.nsmallest(best, [*sums[n], *longer])
    return [(-total, members) for total, members in sums[count]]
