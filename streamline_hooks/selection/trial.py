"""Evaluate selections temporarily: apply, run, compare with the original, undo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from streamline_hooks.core import Batch, UnsupportedSurgery
from streamline_hooks.evaluation import Perplexity, distances_of_variants, perplexity, perplexity_of_candidates
from streamline_hooks.modeling import BRANCHES, BlockStack, Branch, Candidate, StateSource, Task, branches_of
from streamline_hooks.repair import BranchLinear, WindowReplacement, insert_replacement, is_spliced
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection.selection import Selection
from streamline_hooks.surgery import LayerSurgeon, ModelSource, zero_output

Writers = Mapping[tuple[int, Branch], Sequence[str]]
"""By (block, branch), the paths inside the block of the modules whose outputs the branch adds to the hidden state."""


@dataclass(frozen=True)
class Trial:
    """Selection to evaluate, with the replacements of its windows.

    Attributes
    ----------
    selection : Selection
        The blocks to remove and branches to zero.
    replacement_modules : tuple of WindowReplacement
        One per window, or empty for removal without replacement.
    maps : tuple of BranchLinear
        Linear maps that replace zeroed branches.

    Examples
    --------
    >>> Trial(Selection((range(2, 4),))).replacement_modules
    ()
    """

    selection: Selection
    replacement_modules: tuple[WindowReplacement, ...] = ()
    maps: tuple[BranchLinear, ...] = ()

    def candidate(self, stack: BlockStack) -> Candidate | None:
        """Return a `Candidate` if the trial can be evaluated by running only the blocks after its window, else None."""
        replacement_module = self.replacement_modules[0] if self.replacement_modules else None
        if len(self.selection.windows) != 1 or self.selection.zeroed or not is_spliced(stack, replacement_module):
            return None
        return Candidate(
            self.selection.windows[0], replacement_module if isinstance(replacement_module, nn.Module) else None
        )


def branch_writers(
    stack: BlockStack, blocks: Iterable[int], probe: Batch | Tensor | None = None
) -> dict[tuple[int, Branch], tuple[str, ...] | UnsupportedSurgery]:
    """Find the modules that write the output of each branch, or the error if it cannot be zeroed."""
    return {
        (k, branch): known
        if isinstance(known, UnsupportedSurgery)
        else tuple(sorted({path.rpartition(".")[0] for path in known.writers[branch]}))
        for k, known in branches_of(stack, blocks, probe).items()
        for branch in BRANCHES
    }


@contextmanager
def selection_applied(
    stack: BlockStack, attempt: Trial, writers: Writers, probe: Batch | Tensor | None = None
) -> Iterator[dict[int, int]]:
    """Apply a trial for the duration of the context, and yield the map from original to current block indices.

    The surgeon does not probe the model. A hook on the modules in `writers` (see `branch_writers`) zeroes the output of
    each selected branch; this equals `LayerSurgeon.zero_branch` without the search for the branch. `probe` is a batch
    without padding for folding into models that cannot be probed with token ids.
    """
    selection = attempt.selection
    replacement_modules = attempt.replacement_modules or (None,) * len(selection.windows)
    with ExitStack() as exits:
        for k, branch in selection.zeroed:
            for path in writers[k, branch]:
                handle = stack[k].get_submodule(path).register_forward_hook(zero_output)
                exits.callback(handle.remove)
        surgeon = exits.enter_context(LayerSurgeon(stack.model, stack, probe=False))
        for linear in sorted(attempt.maps, key=lambda linear: (linear.block, not linear.is_first)):
            surgeon.insert(
                linear.block if linear.is_first else linear.block + 1, LinearReplacement.from_map(linear.map)
            )
        for window, replacement_module in zip(selection.windows, replacement_modules, strict=True):
            insert_replacement(surgeon, window, replacement_module, batch=probe)
        yield surgeon.plan.old_to_new


def trial_distances(
    source: StateSource,
    batches: Sequence[Batch | Tensor],
    attempts: Sequence[Trial],
    desc: str,
    *,
    writers: Writers | None = None,
    probe: Batch | Tensor | None = None,
    task: Task | None = None,
) -> list[float | UnsupportedSurgery]:
    """Return the mean distance of each trial from the original (`Task.distance`), or the error that prevents it.

    The cost is one pass of the original and one per trial. `writers` and `probe` are those of `selection_applied`.
    """
    surgeries = [partial(selection_applied, source.stack, attempt, writers or {}, probe) for attempt in attempts]
    return distances_of_variants(source, batches, surgeries, desc, task or Task.of(source.model))


def trial_perplexities(
    model: BlockStack | StateSource,
    batches: Sequence[Batch | Tensor],
    attempts: Sequence[Trial],
    desc: str = "perplexity",
) -> tuple[Perplexity, list[Perplexity]]:
    """Compute the perplexity of the original and of each trial; the model is restored afterwards.

    For a trial with a single window, only the blocks after the window are run, unless its replacement occupies block
    slots or is folded into weights.

    Parameters
    ----------
    model : BlockStack or StateSource
        The original model.
    batches : sequence of mapping or torch.Tensor
        Token ids of shape (batch, tokens), or mappings with ``input_ids``.
    attempts : sequence of Trial
        The trials.
    desc : str
        Label of the progress bar.

    Returns
    -------
    (Perplexity, list of Perplexity)
        The original's, and one per trial.

    Raises
    ------
    UnsupportedSurgery
        If a selection cannot be applied.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.modeling import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> stack, trial = find_stack(tiny_model("llama")), Trial(Selection((range(1, 3),)))
    >>> original, results = trial_perplexities(stack, [torch.arange(3, 23).view(2, 10)], [trial])
    >>> original.tokens, len(results)
    (18, 1)
    """
    source = model if isinstance(model, StateSource) else ModelSource(model.model, model)
    stack = source.stack
    candidates = {k: c for k, attempt in enumerate(attempts) if (c := attempt.candidate(stack)) is not None}
    original, results = perplexity_of_candidates(source, batches, list(candidates.values()), desc)
    perplexities = dict(zip(candidates, results, strict=True))
    zeroed_blocks = {k for attempt in attempts for k, _ in attempt.selection.zeroed}
    known = branch_writers(stack, sorted(zeroed_blocks), batches[0]) if zeroed_blocks else {}
    writers = {branch: paths for branch, paths in known.items() if not isinstance(paths, UnsupportedSurgery)}
    for k, attempt in enumerate(attempts):
        if k not in perplexities:
            for branch in attempt.selection.zeroed:
                if isinstance(refusal := known[branch], UnsupportedSurgery):
                    raise refusal
            with selection_applied(stack, attempt, writers):
                perplexities[k] = perplexity(source.current(), batches, f"{desc}, {k + 1}: {attempt.selection}")
    return original, [perplexities[k] for k in range(len(attempts))]
