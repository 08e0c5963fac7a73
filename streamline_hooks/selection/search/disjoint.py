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
    """Select disjoint windows with the greatest sum of scores, exactly, by dynamic programming.

    Parameters
    ----------
    score : callable
        Scores a sequence of windows; higher scores go first. Called once, with about length·count windows.
    length : int
        Number of blocks of the stack.
    count : int
        Number of blocks to remove in total.
    parts : int
        Number of windows; at least one block stays between two.
    keep : iterable of int
        Blocks that must stay; negative numbers count from the end.
    best : int
        Number of selections to return.
    shortest : int
        Least length of each window: more than the slots that its replacement takes.

    Returns
    -------
    list of Selection
        The best first, fewer if there are fewer; ties go to the earlier windows. The score is the sum of the windows'.

    Raises
    ------
    StreamlineError
        If there is none.

    Notes
    -----
    The sum ignores how the loss of one window changes with another; `greedy` and `verified` do not.

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


def one_shot(score: Scorer, length: int, count: int, *, keep: Iterable[int] = (), best: int = 1) -> list[Selection]:
    """Select the single blocks with the greatest sum of scores (ShortGPT, arXiv 2403.03853, with Block Influence).

    Parameters
    ----------
    score : callable
        Scores a sequence of windows of one block each; higher scores go first.
    length : int
        Number of blocks of the stack.
    count : int
        Number of blocks to remove.
    keep : iterable of int
        Blocks that must stay; negative numbers count from the end.
    best : int
        Number of selections to return.

    Returns
    -------
    list of Selection
        The best first, fewer if there are fewer; ties go to the earlier blocks. Consecutive blocks are one window.

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
    """Select the attentions or MLPs across which the state turns least (He et al., arXiv 2406.15786).

    Parameters
    ----------
    scores : BranchScores
        As `measure_branches` returns them. Branches that were not measured or add nothing are not selected.
    branch : {"attention", "mlp"}
    count : int
        Number of branches to silence.
    keep : iterable of int
        Blocks that must stay as they are; negative numbers count from the end.
    best : int
        Number of selections to return.

    Returns
    -------
    list of Selection
        The best first; the score is the sum of the mean cosines of the states before and after each branch.

    Raises
    ------
    StreamlineError
        If there are too few branches to choose from.

    Examples
    --------
    >>> import torch
    >>> scores = BranchScores(3)
    >>> before = torch.eye(4)[None, :2]
    >>> for k in range(3):
    ...     scores.update(k, "attention", before, before + (k + 1) * before.roll(1, 1), torch.ones(1, 2))
    >>> str(silenced_branches(scores, "attention", 2)[0])
    'attention of 0, attention of 1'
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
