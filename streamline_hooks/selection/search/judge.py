"""Evaluate selections without changing the model: apply each, run, compare with the original, undo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.branches import Branch
from streamline_hooks.distance import reference_of, summed_distance
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import Candidate, Perplexity, perplexity, perplexity_of_candidates
from streamline_hooks.passes import inference, progress
from streamline_hooks.repair import StandIn, place
from streamline_hooks.repair.branch_linear import BranchLinear
from streamline_hooks.repair.stand_in import is_spliced
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.silence import adds_nothing, branches_of
from streamline_hooks.task import Task

Writers = Mapping[tuple[int, Branch], Sequence[str]]
"""By block and branch, the paths below the block of the modules that write what the branch adds."""


@dataclass(frozen=True)
class Attempt:
    """A selection with the replacements of its windows; by default none.

    Attributes
    ----------
    selection : Selection
    stand_ins : tuple of StandIn
        One for each window, or empty.
    maps : tuple of BranchLinear
        Linear maps that replace silenced branches.
    """

    selection: Selection
    stand_ins: tuple[StandIn, ...] = ()
    maps: tuple[BranchLinear, ...] = ()

    def candidate(self, stack: BlockStack) -> Candidate | None:
        """Return the candidate that runs only the blocks after the window; None if more of the model changes."""
        stand_in = self.stand_ins[0] if self.stand_ins else None
        if len(self.selection.windows) != 1 or self.selection.silenced or not is_spliced(stack, stand_in):
            return None
        return Candidate(self.selection.windows[0], stand_in if isinstance(stand_in, nn.Module) else None)


def writers_of(
    stack: BlockStack, blocks: Iterable[int], probe: Batch | Tensor | None = None
) -> dict[tuple[int, Branch], tuple[str, ...] | UnsupportedSurgery]:
    """Find the modules whose output is zeroed to silence each branch, or the error why it cannot be silenced."""
    found: dict[tuple[int, Branch], tuple[str, ...] | UnsupportedSurgery] = {}
    branches: tuple[Branch, ...] = ("attention", "mlp")
    for k, known in branches_of(stack, blocks, probe).items():
        for branch in branches:
            if isinstance(known, UnsupportedSurgery):
                found[k, branch] = known
            else:
                found[k, branch] = tuple(sorted({path.rpartition(".")[0] for path in known.writers[branch]}))
    return found


@contextmanager
def given_up(
    stack: BlockStack, attempt: Attempt, writers: Writers, probe: Batch | Tensor | None = None
) -> Iterator[dict[int, int]]:
    """Apply an attempt for the duration of the context; yield the present number of each block that is left.

    The surgeon does not probe. Silenced branches get a hook that zeroes their output, which equals
    `LayerSurgeon.silence` but needs no search for the branch: `writers` has the modules, see `writers_of`. `probe` is a
    batch without padding, for models that cannot be probed with tokens, where something is folded.
    """
    selection = attempt.selection
    stand_ins = attempt.stand_ins or (None,) * len(selection.windows)
    with ExitStack() as exits:
        for k, branch in selection.silenced:
            for path in writers[k, branch]:
                handle = stack[k].get_submodule(path).register_forward_hook(adds_nothing)
                exits.callback(handle.remove)
        surgeon = exits.enter_context(LayerSurgeon(stack.model, stack, probe=False))
        for one in sorted(attempt.maps, key=lambda one: (one.block, not one.is_first)):
            surgeon.insert(one.block if one.is_first else one.block + 1, LinearReplacement.from_map(one.map))
        for window, stand_in in zip(selection.windows, stand_ins, strict=True):
            place(surgeon, window, stand_in, batch=probe)
        yield surgeon.plan.old_to_new


def distances_of_attempts(
    stack: BlockStack,
    batches: Sequence[Batch | Tensor],
    attempts: Sequence[Attempt],
    what: str,
    *,
    writers: Writers | None = None,
    probe: Batch | Tensor | None = None,
    task: Task | None = None,
) -> list[float | UnsupportedSurgery]:
    """Return the mean distance of each attempt to the original (`Task.distance`), or the error that refuses it.

    Each batch is run once through the original, and once for each attempt. `writers` and `probe` are as for `given_up`.
    """
    model, task, batches = stack.model, task or Task.of(stack.model), list(batches)
    tokens = [tokens_of(batch) for batch in batches]
    sums: list[float | UnsupportedSurgery] = [0.0] * len(attempts)
    answers = 0
    with inference(model), progress(sum(tokens) * len(attempts), what) as bar:
        for number, batch in enumerate(batches):
            inputs = prepare(model, batch)
            reference = reference_of(task, task.answers(model(**inputs), batch))
            if not torch.isfinite(reference.sum(dtype=torch.float64)):
                raise StreamlineError(
                    f"The original's logits hold NaN or infinite values (batch {number}). Expected finite logits. Run "
                    "in a wider precision (float32 or bfloat16)."
                )
            answers += len(reference)
            for k, attempt in enumerate(attempts):
                before = sums[k]
                if not isinstance(before, UnsupportedSurgery):
                    try:
                        with given_up(stack, attempt, writers or {}, probe):
                            said = task.answers(model(**inputs), batch)
                        sums[k] = before + summed_distance(task, reference, said)
                    except UnsupportedSurgery as error:
                        sums[k] = error
                bar.update(tokens[number])
    if not answers:
        raise StreamlineError("The batches hold no real token. Expected one or more. Give longer text.")
    return [s if isinstance(s, UnsupportedSurgery) else s / answers for s in sums]


def perplexity_of_attempts(
    stack: BlockStack, batches: Sequence[Batch | Tensor], attempts: Sequence[Attempt], what: str = "perplexity"
) -> tuple[Perplexity, list[Perplexity]]:
    """Compute the perplexity of the original and of each attempt, without changing the model.

    For attempts of a single window only the blocks after it are run, unless blocks replace it or something is folded
    into the model.

    Parameters
    ----------
    stack : BlockStack
        Of the original.
    batches : sequence of mapping or torch.Tensor
    attempts : sequence of Attempt
    what : str
        Description in the progress bar.

    Returns
    -------
    original : Perplexity
    attempts : list of Perplexity

    Raises
    ------
    UnsupportedSurgery
        If a selection cannot be applied.
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
