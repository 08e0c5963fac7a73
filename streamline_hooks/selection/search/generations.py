"""The generations of an evolutionary search: children, successive selection, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.selection.search.judge import Attempt, Judge
from streamline_hooks.selection.search.levels import Gone, Levels, gone_of, selection_of
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery import LayerSurgeon

_TRIES = 20  # mutations drawn for one child that is new


@dataclass(frozen=True)
class Generation:
    """How far the search has come.

    Attributes
    ----------
    number : int
        0 for the selections that it was started with.
    judged : tuple of Selection
        All that were judged on all batches so far, the best first. The score is minus the KL to the original in nats
        a token; minus infinity for what the surgeon refuses, or leaves no finite logits.
    """

    number: int
    judged: tuple[Selection, ...]

    @property
    def best(self) -> Selection:
        """The best so far; in no later generation it is worse."""
        return self.judged[0]


@dataclass
class Run:
    """The state of one search."""

    stack: BlockStack
    levels: Levels
    judge: Judge
    offspring: int
    stages: tuple[tuple[int, int], ...]
    seed: int
    probe: Batch | Tensor | None
    scores: dict[Gone, float] = field(default_factory=dict)  # on all batches
    proven: set[Gone] = field(default_factory=set)
    refusal: UnsupportedSurgery | None = None

    def generations(self, seeds: Sequence[Selection] | Generation) -> Iterator[Generation]:
        """Run the search, from selections or from where an earlier run had come."""
        if isinstance(seeds, Generation):
            number = seeds.number
            self.scores = {gone_of(selection): selection.score for selection in seeds.judged}
        else:
            number = 0
            self.judge_on_all(list(dict.fromkeys(gone_of(selection) for selection in seeds)), number)
        best = self.prove_best()
        yield self.generation(number)
        while True:
            number += 1
            random = Random(f"{self.seed}/{number}")  # of this generation alone, so that a run can be gone on from
            pool = self.children(best, random)
            if not pool:
                return
            for stage, (tokens, survivors) in enumerate(self.stages):
                chosen = self.draw(tokens, random)
                if len(pool) > survivors and len(chosen) < len(self.judge.batches):
                    what = f"generation {number}, stage {stage + 1}: {len(pool)} children"
                    pool = self.survivors(pool, self.trial(pool, what, chosen), survivors)
            self.judge_on_all(pool, number)
            best = self.prove_best()
            yield self.generation(number)

    def generation(self, number: int) -> Generation:
        """What is known so far."""
        return Generation(number, tuple(selection_of(gone, self.scores[gone]) for gone in self.in_order()))

    def in_order(self) -> list[Gone]:
        """All that was judged on all batches, the best first."""
        return sorted(self.scores, key=lambda gone: (-self.scores[gone], sorted(gone)))

    def children(self, parent: Gone, random: Random) -> list[Gone]:
        """New ones only: what was judged on all batches is known."""
        found: list[Gone] = []
        for _ in range(self.offspring):
            for _ in range(_TRIES):
                child = self.levels.mutated(parent, random)
                if child not in self.scores and child not in found:
                    found.append(child)
                    break
        return found

    def draw(self, tokens: int, random: Random) -> list[int]:
        """Batches that hold so many tokens, or all."""
        drawn, held = [], 0
        for number in random.sample(range(len(self.judge.batches)), len(self.judge.batches)):
            if held >= tokens:
                break
            drawn.append(number)
            held += self.judge.tokens[number]
        return sorted(drawn)

    def survivors(self, pool: list[Gone], scores: list[float], count: int) -> list[Gone]:
        """The best few of those that can go."""
        order = sorted(range(len(pool)), key=lambda k: (-scores[k], k))
        return [pool[k] for k in order[:count] if scores[k] > -math.inf]

    def trial(self, pool: list[Gone], what: str, numbers: Sequence[int] | None = None) -> list[float]:
        """The fitness of each; minus infinity of what cannot go, or leaves no finite logits."""
        scores: list[float] = []
        if not pool:
            return scores
        for gone, kl in zip(
            pool, self.judge.distances([Attempt(selection_of(g)) for g in pool], what, numbers), strict=True
        ):
            if isinstance(kl, UnsupportedSurgery):
                self.refusal = kl
                scores.append(-math.inf)
            else:
                scores.append(-kl if math.isfinite(kl) else -math.inf)
            if scores[-1] == -math.inf:
                self.scores[gone] = -math.inf
        return scores

    def judge_on_all(self, pool: list[Gone], number: int) -> None:
        """Give each its final score."""
        what = f"generation {number}: {len(pool)} on all batches"
        for gone, score in zip(pool, self.trial(pool, what), strict=True):
            self.scores[gone] = score

    def prove_best(self) -> Gone:
        """Hold the best against the truth, and strike it out where the surgeon refuses it."""
        while True:
            best = self.in_order()[0]
            if best in self.proven:
                return best
            if self.scores[best] == -math.inf:
                reason = self.refusal or "none leaves a model with finite logits"
                raise StreamlineError(f"Not one of the selections to start from can be carried out: {reason}")
            try:
                self.carry_out(selection_of(best))
                self.proven.add(best)
            except UnsupportedSurgery as error:
                self.refusal, self.scores[best] = error, -math.inf

    def carry_out(self, selection: Selection) -> None:
        """Give a selection up as it would be for good, with the surgeon's probes, and take it back."""
        with LayerSurgeon(self.stack.model, self.stack) as surgeon:
            for window in selection.windows:
                surgeon.remove(window)
            for k, branch in selection.silenced:
                surgeon.silence(k, branch, batch=self.probe)
