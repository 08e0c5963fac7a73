"""How far the model is from the original when a selection is given up: carry it out, run, compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.branches import Branch
from streamline_hooks.distance import reference_of, summed_distance
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation.candidates import Candidate
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
    """A selection, and what stands in the place of each of its windows; by default nothing.

    Attributes
    ----------
    selection : Selection
    stand_ins : tuple of StandIn
        One a window, or empty.
    maps : tuple of BranchLinear
        What stands in the place of silenced branches, of those that something does.
    """

    selection: Selection
    stand_ins: tuple[StandIn, ...] = ()
    maps: tuple[BranchLinear, ...] = ()

    def candidate(self, stack: BlockStack) -> Candidate | None:
        """The same for a pass that runs only what comes after a window; None where more of the model changes."""
        stand_in = self.stand_ins[0] if self.stand_ins else None
        if len(self.selection.windows) != 1 or self.selection.silenced or not is_spliced(stack, stand_in):
            return None
        return Candidate(self.selection.windows[0], stand_in if isinstance(stand_in, nn.Module) else None)


def writers_of(
    stack: BlockStack, blocks: Iterable[int], probe: Batch | Tensor | None = None
) -> dict[tuple[int, Branch], tuple[str, ...] | UnsupportedSurgery]:
    """Find, once for many trials, what is to be thrown away so that a branch adds nothing.

    Parameters
    ----------
    stack : BlockStack
    blocks : iterable of int
    probe : mapping or torch.Tensor, optional
        What to run a model on that cannot be probed otherwise, without padding.

    Returns
    -------
    dict
        For each block and branch the paths below the block, or the error that says why it cannot be silenced.
    """
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
    """Let a model be, for a trial, as it is without a selection.

    Windows are given up by a surgeon that does not probe. What a silenced branch would add is thrown away, which is
    the truth that `LayerSurgeon.silence` is held against, and costs no search for the branch in every trial.

    Parameters
    ----------
    stack : BlockStack
    attempt : Attempt
    writers : mapping
        Of the branches that are silenced, see `writers_of`.
    probe : mapping or torch.Tensor, optional
        What to run a model on that cannot be probed otherwise, without padding, where something is folded.

    Yields
    ------
    dict of int to int
        The present number of each block that is left.

    Raises
    ------
    UnsupportedSurgery
        If a window cannot go.
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


class Judge:
    """How far what is said without selections is from what the original says, on batches chosen anew each time.

    Parameters
    ----------
    stack : BlockStack
        Of the original.
    batches : sequence of mapping or torch.Tensor
    writers : mapping
        Of the branches that are silenced, see `writers_of`.
    reuse : int
        Bytes that the original's answers may take from one call to the next. Those of the first batches
        that fit are kept; the others are computed once a call, for all selections together.
    probe : mapping or torch.Tensor, optional
        What to run a model on that cannot be probed otherwise, without padding, where something is folded.
    task : Task, optional
        What the model is for, see `Task.of`.
    """

    def __init__(
        self,
        stack: BlockStack,
        batches: Sequence[Batch | Tensor],
        writers: Writers | None = None,
        reuse: int = 0,
        probe: Batch | Tensor | None = None,
        task: Task | None = None,
    ) -> None:
        self.stack, self.batches = stack, list(batches)
        self._writers, self._probe, self.task = writers or {}, probe, task or Task.of(stack.model)
        self._left = reuse
        self.reused: dict[int, Tensor] = {}

    @property
    def tokens(self) -> list[int]:
        """The real tokens of each batch."""
        return [tokens_of(batch) for batch in self.batches]

    def distances(
        self, attempts: Sequence[Attempt], what: str, numbers: Sequence[int] | None = None
    ) -> list[float | UnsupportedSurgery]:
        """Judge selections, each batch with all of them before the next.

        Parameters
        ----------
        attempts : sequence of Attempt
        what : str
            What the bar says.
        numbers : sequence of int, optional
            Which batches; all by default.

        Returns
        -------
        list
            For each the mean distance of an answer (`Task.distance`): KL(original ‖ shortened) in nats a token, for
            instance; or the error that says why it cannot go.

        Raises
        ------
        StreamlineError
            If the original's answers are not finite, or no token is real.
        """
        numbers = range(len(self.batches)) if numbers is None else numbers
        sums: list[float | UnsupportedSurgery] = [0.0] * len(attempts)
        answers, model = 0, self.stack.model
        with inference(model), progress(sum(self.tokens[n] for n in numbers) * len(attempts), what) as bar:
            for number in numbers:
                given = prepare(model, self.batches[number])
                reference = self._reference(number, given)
                answers += len(reference)
                for k, attempt in enumerate(attempts):
                    before = sums[k]
                    if not isinstance(before, UnsupportedSurgery):
                        try:
                            with given_up(self.stack, attempt, self._writers, self._probe):
                                said = self.task.answers(model(**given), self.batches[number])
                            sums[k] = before + summed_distance(self.task, reference, said)
                        except UnsupportedSurgery as error:
                            sums[k] = error
                    bar.update(self.tokens[number])
        if not answers:
            raise StreamlineError("The batches hold no real token; give some to judge on.")
        return [s if isinstance(s, UnsupportedSurgery) else s / answers for s in sums]

    def _reference(self, number: int, given: dict[str, Any]) -> Tensor:
        """The original's answers to a batch, as log-probabilities or vectors of length one."""
        if number in self.reused:
            return self.reused[number]
        said = self.task.answers(self.stack.model(**given), self.batches[number])
        reference = reference_of(self.task, said)
        if not torch.isfinite(reference.sum(dtype=torch.float64)):
            raise StreamlineError(
                f"The original's logits hold NaN or infinite values (batch {number}); nothing can be judged by them. "
                "Run in a wider precision (float32 or bfloat16)."
            )
        size = reference.numel() * reference.element_size()
        if size <= self._left:
            self._left -= size
            self.reused[number] = reference
        return reference
