"""What a student writes while it is trained: how long the texts are, how many there were, and what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from streamline_hooks.batch import Batch
from streamline_hooks.repair.on_policy import OnPolicy, TextLength
from streamline_hooks.repair.rollouts import Counts, Rollouts, roll_out

Losses = list[tuple[float, int]]  # each summed over so many tokens


class OwnText:
    """The student's own text in one training.

    Parameters
    ----------
    settings : OnPolicy

    Attributes
    ----------
    settings : OnPolicy
    length : TextLength
    rollouts : list of Rollouts
        The latest.
    losses : list of (float, int)
        Of the steps on it since the last validation.
    written : int
        Tokens, in all processes.
    seconds : float
        That the writing took, in this process.
    """

    def __init__(self, settings: OnPolicy) -> None:
        self.settings, self.length = settings, TextLength(settings, settings.shortest)
        self.rollouts: list[Rollouts] = []
        self.losses: Losses = []
        self.written, self.seconds = 0, 0.0

    def write(
        self, model: nn.Module, batches: Mapping[int, Batch], seeds: Mapping[int, tuple[int, int]], share: float
    ) -> Counts:
        """Let the model write on from batches, each with a seed of its own, so large a share of one at a time."""
        began, own = time.perf_counter(), self.settings
        self.rollouts = [
            roll_out(
                model,
                batch,
                prompt=own.prompt,
                new_tokens=self.length.length,
                temperature=own.temperature,
                top_p=own.top_p,
                seed=seeds[number],
                share=share,
            )
            for number, batch in batches.items()
        ]
        self.seconds += time.perf_counter() - began
        return sum((one.counts for one in self.rollouts), Counts())

    def note(self, counts: Sequence[Counts], loss: tuple[float, int]) -> None:
        """Count what all processes wrote for a step, and what the step came to."""
        self.length.note(sum(its.texts for its in counts), sum(its.whole for its in counts))
        self.written += sum(its.written for its in counts)
        self.losses.append(loss)

    def said(self, seconds: float) -> str:
        """For the bar of a training that has taken so long; empty before the first step on it."""
        if not self.losses or not seconds:
            return ""
        value, count = self.losses[-1]
        share = min(1.0, self.seconds / seconds)
        return f"own text of {self.length.length} tokens (writing: {share:.0%} of the time) {value / count:.4f}, "

    def state_dict(self) -> dict[str, Any]:
        """What a training goes on from, as JSON values."""
        return {
            "length": self.length.so_far, "losses": self.losses, "written": self.written, "seconds": self.seconds,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.length = TextLength(self.settings, *state["length"])
        self.losses = [(value, count) for value, count in state["losses"]]
        self.written, self.seconds = state["written"], state["seconds"]


def mean_of(losses: Losses) -> float | None:
    """The mean a token of losses that are summed over so many."""
    counted = sum(n for _, n in losses)
    return math.fsum(value for value, _ in losses) / counted if counted else None
