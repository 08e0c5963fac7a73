"""Perplexity of windows replaced, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.blockwise.judging import perplexities
from streamline_hooks.blockwise.passing import BlockwisePass, Journey
from streamline_hooks.blockwise.room import require_room, state_bytes
from streamline_hooks.evaluation import Perplexity
from streamline_hooks.evaluation.candidates import Candidate
from streamline_hooks.passes import inference
from streamline_hooks.stack import find_stack


@checked()
def perplexity_of_candidates(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[Candidate],
    *,
    stack: str | None = None,
    memory: int = 2**31,
    folder: str | Path | None = None,
    check: bool = True,
    before_done: Callable[[tuple[Perplexity, list[Perplexity]]], None] = lambda measured: None,
) -> tuple[Perplexity, list[Perplexity]]:
    """Perplexity of a model and of each candidate, as in memory; every block is read once, the last one twice.

    Parameters
    ----------
    model : torch.nn.Module
        From `open_checkpoint`.
    batches : sequence of mapping or torch.Tensor
    candidates : sequence of Candidate
        A window each, and what would stand in its place.
    stack, memory, folder, check
        As for `profile`. An interrupted pass is gone on with by the same candidates only, whose weights are not
        looked at.
    before_done : callable
        Is given what is returned while the states are still there, so that it can be kept before they go.

    Returns
    -------
    original : Perplexity
    candidates : list of Perplexity

    Raises
    ------
    UnsupportedSurgery
        If the model cannot be run block by block.
    StreamlineError
        If there is no room for the states, or they are not finite.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> tokens = [torch.arange(3, 43).view(4, 10)]
    >>> original, (removed,) = perplexity_of_candidates(tiny_model("llama"), tokens, [Candidate(range(2, 4))])
    >>> original.tokens, removed.tokens
    (36, 36)
    """
    found, batches = find_stack(model, stack), list(batches)
    own, length = range(len(batches)), len(found)
    others = [range((k + 1) * len(own), (k + 2) * len(own)) for k in range(len(candidates))]
    room = None if folder is None else Path(folder)
    require_room((3 + 3 * len(candidates)) * sum(state_bytes(found, batches)), memory, room)
    windows = [candidate.window for candidate in candidates]
    modules = ["none" if c.module is None else type(c.module).__name__ for c in candidates]
    with BlockwisePass(
        model,
        batches,
        memory=memory,
        folder=room,
        check=check,
        run={"windows": [[w.start, w.stop] for w in windows], "modules": modules},
        others=[Journey(number, window.stop, length) for window in windows for number in own],
        stack=stack,
        what=f"perplexity of the original and {len(candidates)} others",
    ) as states:
        for place in states:
            for candidate, numbers in zip(candidates, others, strict=True):
                if candidate.window.stop == place:
                    for number, batch in zip(numbers, own, strict=True):
                        states.put(number, in_its_place(candidate.module, states.read(candidate.window.start, batch)))
            # At the place where a pass goes on, what ended there is put in again.
            waiting = {window.start for window in windows if window.stop >= place}
            for earlier in set(range(place)) - waiting:
                states.drop(earlier)
        result = perplexities(states, own, others)
        before_done(result)
        states.done()
    return result


def in_its_place(module: nn.Module | None, state: Tensor) -> Tensor:
    """What leaves the place of a window that this state enters."""
    if module is None:
        return state
    with inference(module):
        made: Tensor = module(state)
    return made
