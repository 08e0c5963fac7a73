"""What comes when in a training: batches, validations, and when it is over. It follows from the settings alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from streamline_hooks.repair.settings import Training


class Course:
    """The course of a training.

    Parameters
    ----------
    settings : Training
    batches : int
        How many there are.

    Attributes
    ----------
    steps : int

    Examples
    --------
    >>> course = Course(Training(epochs=2, accumulation=4), 6)
    >>> course.steps, sorted(course.batches_of(2) + course.batches_of(3))
    (4, [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, settings: Training, batches: int) -> None:
        self.settings, self._batches = settings, batches
        self._a_epoch = math.ceil(batches / settings.accumulation)
        self.steps = round(settings.epochs * self._a_epoch)

    def batches_of(self, step: int) -> list[int]:
        """The batches of a step: each epoch has an order of its own, which the seed tells."""
        size = self.settings.accumulation
        epoch, place = divmod(step, self._a_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        order = torch.randperm(self._batches, generator=generator).tolist()
        return order[place * size : (place + 1) * size]

    def seed_of(self, step: int, rank: int) -> int:
        """Of the random numbers of one of several processes in a step; torch's generator looks at 32 bits."""
        said = f"{self.settings.seed} {step} {rank}"
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=4).digest())

    def is_due(self, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the distance is to be measured after so many steps; it may have been interrupted before."""
        return not history or (step in self._validations() and history[-1]["step"] < step)

    def out_of_patience(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Why a training is to end early; empty where it is not."""
        since = len(history) - 1 - min(range(len(history)), key=lambda k: history[k]["validated"])
        if self.settings.patience and since >= self.settings.patience:
            text = " and the text's own loss" if self.settings.objective.lm else ""
            return f"the distance to the original{text} on the validation part was no lower {since} times"
        return ""

    def _validations(self) -> set[int]:
        count = min(self.settings.validations, self.steps)
        return {round(self.steps * k / count) for k in range(1, count + 1)}
