"""Greedy search: remove one block after another, measuring again after each."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.passes import progress
from streamline_hooks.selection.criteria import Criterion, criterion_of, score_windows
from streamline_hooks.selection.criteria.scoring import compares_with_the_original
from streamline_hooks.selection.search.selected import Selection, best_windows, runs
from streamline_hooks.selection.target import blocks_to_remove, protected_blocks, windows
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.task import Task


def greedy(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    criterion: Criterion | str,
    count: int,
    *,
    keep: Iterable[int] = (),
    stack: str | None = None,
    task: Task | None = None,
) -> list[Selection]:
    """Remove the best block, measure again without it, and so on, until `count` blocks are removed.

    A criterion of a profile is measured on a new profile each round. One that compares with the original
    (`kl_when_removed`) compares with the model before the first round. The score is the sum of the removed blocks'.
    """
    found = find_stack(model, stack)
    count, protected = blocks_to_remove(count, len(found)), protected_blocks(keep, len(found))
    chosen = criterion_of(criterion)
    original = _with_the_same_weights(model) if count > 1 and compares_with_the_original(chosen) else None
    gone: list[int] = []
    total = 0.0
    score = partial(score_windows, chosen, model=model, batches=batches, stack=found.path, task=task)
    with progress(count, "greedy", "blocks") as bar:
        while len(gone) < count:
            with LayerSurgeon(model, found) as surgeon:
                _remove(surgeon, gone)
                kept = surgeon.plan.kept
                free = windows(len(kept), 1, frozenset(new for new, old in enumerate(kept) if old in protected))
                best = best_windows(partial(score, original=original if gone else None), free)[0]
            gone += (kept[new] for new in best.windows[0])
            total += best.score
            bar.update()
    with LayerSurgeon(model, found) as surgeon:
        _remove(surgeon, gone)  # raises if they cannot be removed
    return [Selection.of_blocks(gone, score=total)]


def _with_the_same_weights(model: nn.Module) -> nn.Module:
    """Copy a model except its weights, so that surgery on the model does not change the copy."""
    weights = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def _remove(surgeon: LayerSurgeon, blocks: Iterable[int]) -> None:
    for run in runs(blocks):
        try:
            surgeon.remove(run)
        except UnsupportedSurgery as error:
            raise UnsupportedSurgery(
                f"The greedy search came to blocks {run.start} to {run.stop - 1}, which cannot go. {error} Protect "
                "them (keep=...) to search among the others.",
                error.cause,
            ) from error
