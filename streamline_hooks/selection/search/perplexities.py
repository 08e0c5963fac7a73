"""Perplexity of selections that are not carried out, at the least cost each allows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.evaluation import Perplexity, perplexity, perplexity_of_candidates
from streamline_hooks.selection.search.judge import Attempt, given_up, writers_of
from streamline_hooks.stack import BlockStack


def perplexity_of_attempts(
    stack: BlockStack, batches: Sequence[Batch | Tensor], attempts: Sequence[Attempt], what: str = "perplexity"
) -> tuple[Perplexity, list[Perplexity]]:
    """Perplexity of the original and of each selection, with what stands in its place.

    Of single windows only the blocks after them are run, unless blocks stand in their place or something is folded
    into the model; every other selection takes a forward of its own.

    Parameters
    ----------
    stack : BlockStack
        Of the original.
    batches : sequence of mapping or torch.Tensor
    attempts : sequence of Attempt
    what : str
        What the bars say.

    Returns
    -------
    original : Perplexity
    attempts : list of Perplexity

    Raises
    ------
    UnsupportedSurgery
        If a selection cannot go.
    """
    alone = {k: one for k, attempt in enumerate(attempts) if (one := attempt.candidate(stack)) is not None}
    original, each = perplexity_of_candidates(stack.model, batches, list(alone.values()), what, stack=stack.path)
    found = dict(zip(alone, each, strict=True))
    silent = {k for attempt in attempts for k, _ in attempt.selection.silenced}
    known = writers_of(stack, sorted(silent), batches[0]) if silent else {}
    writers = {half: paths for half, paths in known.items() if not isinstance(paths, UnsupportedSurgery)}
    for k, attempt in enumerate(attempts):
        if k not in found:
            for half in attempt.selection.silenced:
                if isinstance(refusal := known[half], UnsupportedSurgery):
                    raise refusal
            with given_up(stack, attempt, writers):
                found[k] = perplexity(stack.model, batches, f"{what}, {attempt.selection}")
    return original, [found[k] for k in range(len(attempts))]
