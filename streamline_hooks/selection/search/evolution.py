"""Evolutionary search over blocks, attentions and MLPs (EvoPress, arXiv 2410.14649)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.selection.search.judge import Attempt, Judge, writers_of
from streamline_hooks.selection.search.levels import Gone, Levels, gone_of, selection_of
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.selection.target import protected_blocks
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.silence import silent_parameters
from streamline_hooks.task import Task

STAGES = ((2_048, 8), (8_192, 2))
_REUSED = 2**30  # bytes for the original's log-probabilities that are kept from one stage to the next
_TRIES = 20  # mutations drawn for one child that is new


def evolution(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    seeds: Sequence[Selection],
    *,
    generations: int = 20,
    offspring: int = 32,
    stages: Sequence[tuple[int, int]] = STAGES,
    keep: Iterable[int] = (),
    branches: bool = True,
    seed: int = 0,
    stack: str | None = None,
    task: Task | None = None,
) -> list[Selection]:
    """Improve selections by switching levels.

    In each generation the best selection has children, in which one to three units (a block, an attention or an MLP)
    are restored and others of the same kind removed. All children are judged on few tokens, the better ones on more,
    and the last of them on all batches, together with the best so far. The fitness is minus the KL divergence from
    the original (`Task.distance`). Afterwards, and on Ctrl-C, the model is as it was.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        Calibration text.
    seeds : sequence of Selection
        The first generation, for instance a shortlist. All remove the same number of attentions and of MLPs, and none
        that must stay.
    generations : int
        Number of generations after the first, which is 20 by default. Fewer are run where no child is new any more.
    offspring : int
        Number of children in each generation, 32 by default.
    stages : sequence of (int, int)
        Number of tokens on which the children are judged, and number of those that survive that. The tokens are those
        of whole batches, drawn anew each time.
    keep : iterable of int
        Blocks that must stay with both their branches; negative numbers count from the end.
    branches : bool
        Whether attention and MLP may be removed alone, in blocks where they can be silenced. Where none can, a warning
        says why, and whole blocks are searched over.
    seed : int
        Seed of the random numbers.
    stack : str, optional
        Path of the stack, see `find_stack`.
    task : Task, optional
        What the model is for, see `Task.of`.

    Returns
    -------
    list of Selection
        All selections that were judged on all batches, the best first, without those that cannot be removed.

    Raises
    ------
    StreamlineError
        If no seed can be removed.

    Notes
    -----
    Children that could not be removed are never parents: the surgeon's known hazards are checked in each trial, and
    its probe is run before a selection is taken for the best.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model, tokens = tiny_model("llama"), torch.arange(3, 19)[None]
    >>> shortlist = [Selection((range(2, 4),)), Selection((range(3, 5),))]
    >>> found = evolution(model, [tokens], shortlist, generations=2, offspring=4)
    >>> found[0].score >= max(s.score for s in found if s.windows == (range(2, 4),))
    True
    """
    found = find_stack(model, stack)
    free = frozenset(range(len(found))) - protected_blocks(keep, len(found))
    writers = writers_of(found, sorted(free)) if branches and free else {}
    paths = {half: paths for half, paths in writers.items() if not isinstance(paths, UnsupportedSurgery)}
    reasons = [str(error) for half, error in writers.items() if half not in paths]
    silent = [(k, b) for (k, b), its in paths.items() if all(silent_parameters(found[k].get_submodule(p)) for p in its)]
    for k, branch in silent:  # it would be removed for nothing
        del paths[k, branch]
        reasons.append(f"The {branch} of block {k} is silent already.")
    if branches and writers and not paths:
        warnings.warn(f"Only whole blocks are searched over: {reasons[0]}", stacklevel=2)
    judge = Judge(found, batches, paths, _REUSED, task=task)
    return _Run(found, Levels(free, frozenset(paths)), judge, offspring, stages, seed).run(seeds, generations)


@dataclass
class _Run:
    """The state of one search."""

    stack: BlockStack
    levels: Levels
    judge: Judge
    offspring: int
    stages: Sequence[tuple[int, int]]
    seed: int
    scores: dict[Gone, float] = field(default_factory=dict)  # on all batches
    proven: set[Gone] = field(default_factory=set)
    refusal: UnsupportedSurgery | None = None

    def run(self, seeds: Sequence[Selection], generations: int) -> list[Selection]:
        """Run the search and return what was judged on all batches, the best first."""
        self.judge_on_all(list(dict.fromkeys(map(gone_of, seeds))), 0)
        best = self.prove_best()
        for number in range(1, generations + 1):
            random = Random(f"{self.seed}/{number}")  # of this generation alone
            pool = self.children(best, random)
            if not pool:
                break
            for stage, (tokens, survivors) in enumerate(self.stages):
                chosen = self.draw(tokens, random)
                if len(pool) > survivors and len(chosen) < len(self.judge.batches):
                    what = f"generation {number}, stage {stage + 1}: {len(pool)} children"
                    pool = self.survivors(pool, self.trial(pool, what, chosen), survivors)
            self.judge_on_all(pool, number)
            best = self.prove_best()
        return [selection_of(gone, self.scores[gone]) for gone in self.in_order() if self.scores[gone] > -math.inf]

    def in_order(self) -> list[Gone]:
        """Return all that was judged on all batches, the best first."""
        return sorted(self.scores, key=lambda gone: (-self.scores[gone], sorted(gone)))

    def children(self, parent: Gone, random: Random) -> list[Gone]:
        """Return new ones only: what was judged on all batches is known."""
        found: list[Gone] = []
        for _ in range(self.offspring):
            for _ in range(_TRIES):
                child = self.levels.mutated(parent, random)
                if child not in self.scores and child not in found:
                    found.append(child)
                    break
        return found

    def draw(self, tokens: int, random: Random) -> list[int]:
        """Draw batches that hold so many tokens, or all."""
        drawn, held = [], 0
        for number in random.sample(range(len(self.judge.batches)), len(self.judge.batches)):
            if held >= tokens:
                break
            drawn.append(number)
            held += self.judge.tokens[number]
        return sorted(drawn)

    def survivors(self, pool: list[Gone], scores: list[float], count: int) -> list[Gone]:
        """Return the best few of those that can be removed."""
        order = sorted(range(len(pool)), key=lambda k: (-scores[k], k))
        return [pool[k] for k in order[:count] if scores[k] > -math.inf]

    def trial(self, pool: list[Gone], what: str, numbers: Sequence[int] | None = None) -> list[float]:
        """Return the fitness of each; minus infinity of what cannot be removed, or leaves no finite logits."""
        scores: list[float] = []
        distances = self.judge.distances([Attempt(selection_of(g)) for g in pool], what, numbers) if pool else []
        for gone, kl in zip(pool, distances, strict=True):
            if isinstance(kl, UnsupportedSurgery):
                self.refusal = kl
            fits = not isinstance(kl, UnsupportedSurgery) and math.isfinite(kl)
            scores.append(-kl if fits else -math.inf)  # type: ignore[operator]
            if not fits:
                self.scores[gone] = -math.inf
        return scores

    def judge_on_all(self, pool: list[Gone], number: int) -> None:
        """Give each its final score."""
        scores = self.trial(pool, f"generation {number}: {len(pool)} on all batches")
        self.scores.update(zip(pool, scores, strict=True))

    def prove_best(self) -> Gone:
        """Verify the best with the surgeon's probes, and strike it out where the surgeon refuses it."""
        while True:
            best = self.in_order()[0]
            if best in self.proven:
                return best
            if self.scores[best] == -math.inf:
                reason = self.refusal or "none leaves a model with finite logits"
                raise StreamlineError(f"Not one of the selections to start from can be carried out: {reason}")
            try:
                with LayerSurgeon(self.stack.model, self.stack) as surgeon:
                    selection = selection_of(best)
                    for window in selection.windows:
                        surgeon.remove(window)
                    for k, branch in selection.silenced:
                        surgeon.silence(k, branch)
                self.proven.add(best)
            except UnsupportedSurgery as error:
                self.refusal, self.scores[best] = error, -math.inf
