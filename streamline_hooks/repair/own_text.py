"""What a student writes while it is trained: how long the texts are, how many there were, and what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from streamline_hooks.batch import Batch
from streamline_hooks.repair.on_policy import OnPolicyConfig, TextLength
from streamline_hooks.repair.rollouts import Counts, Rollouts, roll_out

Losses = list[tuple[float, int]]  # each summed over so many tokens


class OwnText:
    """The student's own text in one training.

    Parameters
    ----------
    settings : OnPolicyConfig

    Attributes
    ----------
    settings : OnPolicyConfig
    length : TextLength
    rollouts : list of Rollouts
        The latest.
    losses : list of (float, int)
        Of the steps on it since the last validation.
    texts, whole : int
        Since then, in all processes: that were written, and that were not cut.
    written : int
        Tokens, in all processes.
    seconds : float
        That the writing took, in this process.
    """

    def __init__(self, settings: OnPolicyConfig) -> None:
        self.settings, self.length = settings, TextLength(settings, settings.shortest)
        self.rollouts: list[Rollouts] = []
        self.losses: Losses = []
        self.written, self.seconds = 0, 0.0
        self.texts = self.whole = 0

    def write(
        self, model: nn.Module, batches: Mapping[int, Batch], seeds: Mapping[int, tuple[int, int]], share: float
    ) -> Counts:
        """Let the model write on from batches, each with a seed of its own, so large a share of one at a time."""
        began, own = time.perf_counter(), self.settings
        length = self.length.length
        found = (
            roll_out(
                model, batch, prompt=own.prompt, new_tokens=length, **own.sampling, seed=seeds[number], share=share
            )
            for number, batch in batches.items()
        )
        self.rollouts = [one for one in found if one.counts.texts]
        self.seconds += time.perf_counter() - began
        return sum((one.counts for one in self.rollouts), Counts())

    def note(self, counts: Sequence[Counts], loss: float) -> None:
        """Count what all processes wrote for a step, and what the step came to, a place."""
        all_of_them = sum(counts, Counts())
        self.length.note(all_of_them.texts, all_of_them.whole, loss, all_of_them.answers)
        self.texts, self.whole = self.texts + all_of_them.texts, self.whole + all_of_them.whole
        self.written += all_of_them.written
        self.losses.append((loss * all_of_them.answers, all_of_them.answers))

    def since(self) -> dict[str, Any]:
        """What there was since the last validation, of which a new one begins."""
        whole = self.whole / self.texts if self.texts else None
        said = {"own_loss": mean_of(self.losses), "length": self.length.length, "whole": whole}
        self.losses.clear()
        self.texts = self.whole = 0
        return said

    def said(self, seconds: float) -> str:
        """For the bar of a training that has taken so long; empty before the first step on it."""
        value, count = self.losses[-1] if self.losses else (0.0, 0)
        if not count or not seconds:
            return ""
        share = min(1.0, self.seconds / seconds)
        return (
            f"own text of {self.length.length} tokens ({self.whole / self.texts:.0%} whole; writing: {share:.0%} of "
            f"the time) {value / count:.4f}, "
        )

    def state_dict(self) -> dict[str, Any]:
        """What a training goes on from, as JSON values."""
        return {
            "length": self.length.so_far, "losses": self.losses, "written": self.written, "seconds": self.seconds,
            "texts": self.texts, "whole": self.whole,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.length = TextLength.of(self.settings, state["length"])
        self.losses = [(value, count) for value, count in state["losses"]]
        self.written, self.seconds = state["written"], state["seconds"]
        self.texts, self.whole = state["texts"], state["whole"]


def mean_of(losses: Losses) -> float | None:
    """The mean a token of losses that are summed over so many."""
    counted = sum(n for _, n in losses)
    return math.fsum(value for value, _ in losses) / counted if counted else None
