"""Select several disjoint windows, single blocks or single branches by the sum of their scores."""

from __future__ import annotations

import copy
import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    batches_digest,
    describe_blocks,
    progress_bar,
)
from streamline_hooks.modeling import BRANCHES, Branch, StateSource, Task
from streamline_hooks.selection.criteria import Criterion, resolve_criterion
from streamline_hooks.selection.scoring import compares_with_the_original, leaf_criteria, score_windows
from streamline_hooks.selection.selection import Scorer, Selection, best_windows, consecutive_runs, finite_scores
from streamline_hooks.selection.target import blocks_to_remove, protected_blocks, windows_of_size
from streamline_hooks.statistics import BranchScores, Profile
from streamline_hooks.statistics import profile as measure_profile
from streamline_hooks.surgery import LayerSurgeon, as_state_source

_PartialSelection = tuple[float, tuple[range, ...]]  # (minus the sum of the scores, windows); the smallest is best


def disjoint_windows(
    score: Scorer, length: int, count: int, parts: int, *, protect: Iterable[int] = (), best: int = 1, shortest: int = 1
) -> list[Selection]:
    """Return selections of `parts` disjoint windows with `count` blocks in total and the greatest sums of scores.

    The result is exact: dynamic programming over blocks visited, blocks removed and windows used. `shortest` is the
    minimum length of a window.
    """
    count, protected = blocks_to_remove(count, length), protected_blocks(protect, length)
    longest = count - (parts - 1) * shortest
    candidates = [
        range(start, stop)
        for stop in range(1, length + 1)
        for start in range(max(0, stop - longest), stop - shortest + 1)
        if not protected.intersection(range(start, stop))
    ]
    value = finite_scores(score, candidates)
    # upto[p][blocks, windows]: the best partial selections among the first p blocks.
    empty: dict[tuple[int, int], list[_PartialSelection]] = {(0, 0): [(0.0, ())]}
    upto = [empty]
    for stop in range(1, length + 1):
        partials = {key: list(selections) for key, selections in upto[-1].items()}  # the block before `stop` stays
        for window in (range(start, stop) for start in range(max(0, stop - longest), stop - shortest + 1)):
            if window not in value:
                continue
            for (blocks, windows), selections in upto[max(0, window.start - 1)].items():
                if blocks + len(window) <= count and windows < parts:
                    longer = [(total - value[window], (*chosen, window)) for total, chosen in selections]
                    partials.setdefault((blocks + len(window), windows + 1), []).extend(longer)
        upto.append({key: heapq.nsmallest(best, selections, key=_sort_key) for key, selections in partials.items()})
    chosen = upto[length].get((count, parts), [])
    if not chosen:
        listed = ", ".join(map(str, sorted(protected))) or "none"
        raise StreamlineError(
            f"{parts} windows of {count} blocks in total do not fit into {length} blocks: at least one block must stay "
            f"between two windows, protected blocks ({listed}) stay, and so do windows with score −inf. Remove fewer "
            "blocks, change the number of windows, or protect fewer blocks."
        )
    return [Selection(windows, score=-total) for total, windows in chosen]


def _sort_key(partial: _PartialSelection) -> tuple[float, list[tuple[int, int]]]:
    return partial[0], [(w.start, w.stop) for w in partial[1]]


def one_shot(score: Scorer, length: int, count: int, *, protect: Iterable[int] = (), best: int = 1) -> list[Selection]:
    """Return the sets of `count` blocks with the greatest sums of single-block scores."""
    count, protected = blocks_to_remove(count, length), protected_blocks(protect, length)
    values = finite_scores(score, [range(k, k + 1) for k in range(length) if k not in protected])
    if len(values) < count:
        raise StreamlineError(
            f"Cannot remove {count} of {length} blocks: only {len(values)} can be removed, the others are protected or "
            "have score −inf. Remove fewer blocks, or protect fewer blocks."
        )
    value_of_block = {window.start: value for window, value in values.items()}
    return [Selection.of_blocks(blocks, score=total) for total, blocks in best_sets(value_of_block, count, best)]


def best_sets(values: Mapping[int, float], count: int, best: int) -> list[tuple[float, tuple[int, ...]]]:
    """Return the sets of `count` keys with the greatest sums of values, as (sum, keys), best first."""
    # sums[n]: the best sets of n of the keys so far, as (minus the sum, keys).
    sums: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())], *([] for _ in range(count))]
    for number, value in values.items():
        for n in range(count, 0, -1):
            longer = [(total - value, (*members, number)) for total, members in sums[n - 1]]
            sums[n] = heapq.nsmallest(best, [*sums[n], *longer])
    return [(-total, members) for total, members in sums[count]]


def best_branches(
    scores: BranchScores, branch: Branch, count: int, *, protect: Iterable[int] = (), best: int = 1
) -> list[Selection]:
    """Return selections of `count` branches with the greatest sums of cosines; see `AttentionSearch`.

    Branches that were not measured, or whose output is zero, are not selected.
    """
    cosine = scores.cosine[:, BRANCHES.index(branch)]
    protected = protected_blocks(protect, len(cosine))
    adds = scores.magnitude[:, BRANCHES.index(branch)]
    free = (k for k in range(len(cosine)) if k not in protected and adds[k] > 0)  # excludes NaN: not measured
    values = {k: float(cosine[k]) for k in free}
    if not 1 <= count <= len(values):
        raise StreamlineError(
            f"Cannot zero {count} {branch} branches: {len(values)} are available, the others are protected, "
            f"already zeroed or not measured. Expected a number from 1 to {len(values)}. Remove less, or protect "
            "fewer blocks."
        )
    return [
        Selection((), tuple((k, branch) for k in blocks), score) for score, blocks in best_sets(values, count, best)
    ]


def greedy(
    model: nn.Module | StateSource,
    batches: Sequence[Batch | Tensor],
    criterion: Criterion | str,
    count: int,
    *,
    protect: Iterable[int] = (),
    stack: str | None = None,
    task: Task | None = None,
    profile: Profile | None = None,
) -> list[Selection]:
    """Remove the best block and score the remaining blocks again, until `count` blocks are removed.

    For a criterion that needs a profile, the first round uses `profile`, if given. Each other round measures a new one
    that counts the same tokens. A criterion that compares with the original, such
    as `kl_when_removed`, compares with the model before the first round. The score of the selection is the sum of the
    scores of the removed blocks. Blocks on disk are read once in each round; a criterion that runs the model is refused
    for them.
    """
    source = as_state_source(model, stack)
    block_stack, model = source.stack, source.model
    count, protected = blocks_to_remove(count, len(block_stack)), protected_blocks(protect, len(block_stack))
    chosen = resolve_criterion(criterion)
    if chosen.needs == "model" and not source.in_memory:
        raise UnsupportedSurgery(
            f"The criterion {chosen.name!r} runs the model for each window, but the blocks are on disk. Expected a "
            "criterion of the profile, such as cosine. Choose one, or load the model into memory."
        )
    original = None
    if count > 1 and compares_with_the_original(chosen):  # copy the modules, share the weights
        original = copy.deepcopy(model, {id(weight): weight for weight in (*model.parameters(), *model.buffers())})
    reads_profile = any(part.needs == "profile" for part in leaf_criteria(chosen))
    counts = {} if profile is None else profile.about
    tokens, skip = counts.get("tokens", "all"), counts.get("skip", 0)
    if reads_profile and tokens == "mask" and count > 1:
        raise StreamlineError(
            "The profile counts tokens selected by masks, which it does not contain, so the rounds of a greedy search "
            "cannot count the same tokens. Expected a profile with tokens='all' or 'last'. Profile again, or use "
            "another search."
        )
    measure = partial(_round_profile, batches=batches, tokens=tokens, skip=skip)
    removed: list[int] = []
    total = 0.0
    with progress_bar(count, "greedy", "blocks") as bar:
        while len(removed) < count:
            with LayerSurgeon(model, block_stack, probe=source.in_memory) as surgeon:  # else probed once, at the end
                _remove(surgeon, removed)
                measured = None
                if reads_profile:
                    measured = profile if profile and not removed else measure(source.current(), removed=removed)
                score = partial(score_windows, chosen, profile=measured)
                if source.in_memory:
                    score = partial(score, model=model, batches=batches, stack=block_stack.path, task=task)
                kept = surgeon.plan.kept
                free = windows_of_size(len(kept), 1, frozenset(new for new, old in enumerate(kept) if old in protected))
                best = best_windows(partial(score, original=original if removed else None), free)[0]
            removed += (kept[new] for new in best.windows[0])
            total += best.score
            bar.update()
    with LayerSurgeon(model, block_stack) as surgeon:
        _remove(surgeon, removed)  # raises if the blocks cannot be removed
    return [Selection.of_blocks(removed, score=total)]


def _round_profile(
    source: StateSource, batches: Sequence[Batch | Tensor], tokens: Any, skip: int, removed: Sequence[int]
) -> Profile:
    """Return the profile of the model without some blocks; a continued run takes those of its finished rounds."""
    identity = f"{sorted(removed)} {batches_digest([*batches])}"
    identity += "" if (tokens, skip) == ("all", 0) else f" {tokens} {skip}"
    name = f"greedy_{len(removed)}_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    make = partial(measure_profile, source, batches, tokens=tokens, skip=skip, replicates=0)
    return source.cached(name, make, Profile.save, Profile.load)


def _remove(surgeon: LayerSurgeon, blocks: Iterable[int]) -> None:
    for run in consecutive_runs(blocks):
        try:
            surgeon.remove(run)
        except UnsupportedSurgery as error:
            raise UnsupportedSurgery(
                f"The greedy search selected {describe_blocks(run)}, which cannot be removed. {error} "
                "Protect them (protect=...) to search among the other blocks.",
                error.cause,
            ) from error
