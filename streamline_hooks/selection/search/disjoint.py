"""Select several disjoint windows, single blocks or single branches by the sum of their scores."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from streamline_hooks.branches import BRANCHES, Branch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.search.selected import Scorer, Selection, scores_of
from streamline_hooks.selection.target import blocks_to_remove, protected_blocks
from streamline_hooks.statistics import BranchScores

_Partial = tuple[float, tuple[range, ...]]  # minus the sum of the scores, and the windows: the least is the best


def disjoint_windows(
    score: Scorer, length: int, count: int, parts: int, *, keep: Iterable[int] = (), best: int = 1, shortest: int = 1
) -> list[Selection]:
    """Return selections of `parts` disjoint windows with `count` blocks in total and the greatest sums of scores.

    By dynamic programming over the blocks looked at, the blocks removed and the windows made, which is exact.
    `shortest` is the least length of a window.
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


def one_shot(score: Scorer, length: int, count: int, *, keep: Iterable[int] = (), best: int = 1) -> list[Selection]:
    """Return the sets of `count` single blocks with the greatest sums of scores; consecutive blocks are one window."""
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
    """Return the sets of `count` keys with the greatest sums of values, as (sum, keys), the best first."""
    # sums[n]: the best sets of n of the numbers so far, as minus their sum and the numbers.
    sums: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())], *([] for _ in range(count))]
    for number, value in values.items():
        for n in range(count, 0, -1):
            longer = [(total - value, (*members, number)) for total, members in sums[n - 1]]
            sums[n] = heapq.nsmallest(best, [*sums[n], *longer])
    return [(-total, members) for total, members in sums[count]]


def silenced_branches(
    scores: BranchScores, branch: Branch, count: int, *, keep: Iterable[int] = (), best: int = 1
) -> list[Selection]:
    """Return selections of `count` branches with the greatest sums of cosines; see `AttentionSearch`.

    Branches that were not measured or add nothing are not selected.
    """
    cosine = scores.cosine[:, BRANCHES.index(branch)]
    protected = protected_blocks(keep, len(cosine))
    adds = scores.magnitude[:, BRANCHES.index(branch)]
    free = (k for k in range(len(cosine)) if k not in protected and adds[k] > 0)  # nor NaN
    values = {k: float(cosine[k]) for k in free}
    if not 1 <= count <= len(values):
        raise StreamlineError(
            f"{count} {branch} branches are to be silenced, and {len(values)} can be chosen from: the others are "
            "protected, silenced already, or were not measured. Ask for one or more, and for fewer than there are."
        )
    return [
        Selection((), tuple((k, branch) for k in blocks), score) for score, blocks in best_sets(values, count, best)
    ]
