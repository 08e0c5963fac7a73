"""Several windows that do not touch, for several small networks, the best of all that there are."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.search.selected import Scorer, Selection, scores_of
from streamline_hooks.selection.target import blocks_to_remove, protected_blocks

_Partial = tuple[float, tuple[range, ...]]  # minus the sum of the scores, and the windows: the least is the best


def disjoint_windows(
    score: Scorer, length: int, count: int, parts: int, *, keep: Iterable[int] = (), best: int = 1, shortest: int = 1
) -> list[Selection]:
    """Choose a number of windows with a number of blocks in total, so that the sum of their scores is greatest.

    Parameters
    ----------
    score : callable
        Scores a sequence of windows; the higher, the sooner one goes. It is called once, with every window that can
        be one of them, about length·count; from a saved profile that costs nothing, and with a criterion
        that runs the model a part of a pass each.
    length : int
        Number of blocks of the stack.
    count : int
        Blocks that go in total.
    parts : int
        Windows that they make; between two of them at least one block stays.
    keep : iterable of int
        Blocks that must stay, negative ones counted from the end.
    best : int
        How many selections to return.
    shortest : int
        Blocks of each window at least: more than what stands in its place takes slots.

    Returns
    -------
    list of Selection
        The best ones there are, or all where there are fewer, the best first; ties go to the earlier windows. A
        selection's score is the sum of its windows'.

    Raises
    ------
    StreamlineError
        If there is no such choice.

    Notes
    -----
    By dynamic programming over the place up to which the stack has been looked at, the blocks given up and the
    windows they make, with the best few partial choices at each. It is exact for any score of a window; how the loss
    of one window changes with another is what the sum leaves out (`greedy` and `verified` do not).

    Examples
    --------
    >>> value = [0, 5, 4, 0, 0, 3, 0]
    >>> chosen = disjoint_windows(lambda windows: [sum(value[k] for k in w) for w in windows], 7, 3, 2)
    >>> chosen[0].windows, chosen[0].score
    ((range(1, 3), range(5, 6)), 12.0)
    """
    count, protected = blocks_to_remove(count, length), protected_blocks(keep, length)
    longest = count - (parts - 1) * shortest
    candidates = [
        range(start, stop)
        for stop in range(1, length + 1)
        for start in range(max(0, stop - longest), stop - shortest + 1)
        if not protected.intersection(range(start, stop))
    ]
    value = scores_of(score, candidates)
    # upto[p][blocks, windows]: the best choices among the first p blocks. What precedes block 0 is as good as skipped.
    empty: dict[tuple[int, int], list[_Partial]] = {(0, 0): [(0.0, ())]}
    upto = [empty]
    for stop in range(1, length + 1):
        found = {key: list(partial) for key, partial in upto[-1].items()}  # the block before `stop` stays
        for window in (range(start, stop) for start in range(max(0, stop - longest), stop - shortest + 1)):
            if window not in value:
                continue
            for (blocks, windows), partial in upto[max(0, window.start - 1)].items():
                if blocks + len(window) <= count and windows < parts:
                    longer = [(total - value[window], (*chosen, window)) for total, chosen in partial]
                    found.setdefault((blocks + len(window), windows + 1), []).extend(longer)
        upto.append({key: heapq.nsmallest(best, partial, key=_order) for key, partial in found.items()})
    chosen = upto[length].get((count, parts), [])
    if not chosen:
        listed = ", ".join(map(str, sorted(protected))) or "none"
        raise StreamlineError(
            f"{parts} windows of {count} blocks in total, with a block between two, do not fit among {length} without "
            f"the protected ones ({listed}) and those that score minus infinity. Remove less, ask for other parts, "
            "or protect fewer."
        )
    return [Selection(windows, score=-total) for total, windows in chosen]


def _order(partial: _Partial) -> tuple[float, list[tuple[int, int]]]:
    return partial[0], [(w.start, w.stop) for w in partial[1]]
