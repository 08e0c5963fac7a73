"""One block after the other, each chosen on the model that is already without those before."""

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
from streamline_hooks.selection.search.selected import Selection, runs
from streamline_hooks.selection.search.windows import best_windows
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
    """Give up the best block, measure again without it, and so on (as SLEB does, arXiv 2402.09025).

    Blocks that were next to one another are one window from the round on in which the second of them goes; it takes
    along what an earlier surgery put between them.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        What the criterion is measured on, once a round, of which there are `count`.
    criterion : Criterion or str
        What speaks for giving a window up; of a profile, which is then taken anew each round, or of the model. One
        that compares with the original (`kl_when_removed`) does so with the model as it was before the first round,
        of which a copy without weights of its own is run once in every further round.
    count : int
        Blocks that go.
    keep : iterable of int
        Blocks that must stay; negative numbers count from the end.
    stack : str, optional
        Path of the stack, see `find_stack`.
    task : Task, optional
        What the model is for, see `score_windows`.

    Returns
    -------
    list of Selection
        The one selection that is found. Its score is the sum of the scores with which the blocks went.

    Raises
    ------
    StreamlineError
        If `count` is out of range, or all blocks that are left are protected.
    UnsupportedSurgery
        If the blocks that are to go cannot; the text says why.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> len(greedy(model, [torch.arange(3, 19)[None]], "cosine", 3, keep=[0])[0].blocks)
    3
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
        _remove(surgeon, gone)  # to say here what cannot go
    return [Selection.of_blocks(gone, score=total)]


def _with_the_same_weights(model: nn.Module) -> nn.Module:
    """A copy of a model that a surgery on the model does not change."""
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
