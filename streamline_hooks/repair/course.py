"""What comes when in a training: batches, validations, and when it is over. It follows from the settings alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from streamline_hooks.repair.distillation_config import DistillationConfig


class Course:
    """The course of a training.

    Parameters
    ----------
    config : DistillationConfig
    batches : int
        How many there are.

    Attributes
    ----------
    steps : int

    Examples
    --------
    >>> course = Course(DistillationConfig(epochs=2, gradient_accumulation_steps=4), 6)
    >>> course.steps, sorted(course.batches_of(2) + course.batches_of(3))
    (4, [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, config: DistillationConfig, batches: int) -> None:
        self.config, self._batches = config.seeded(0), batches
        self._a_epoch = math.ceil(batches / config.gradient_accumulation_steps)
        self.steps = round(config.epochs * self._a_epoch)

    def batches_of(self, step: int) -> list[int]:
        """The batches of a step: each epoch has an order of its own, which the seed tells."""
        size = self.config.gradient_accumulation_steps
        epoch, place = divmod(step, self._a_epoch)
        generator = torch.Generator().manual_seed((self.config.seed or 0) + epoch)
        order = torch.randperm(self._batches, generator=generator).tolist()
        return order[place * size : (place + 1) * size]

    def seed_of(self, step: int, rank: int) -> int:
        """Of the random numbers of one of several processes in a step; torch's generator looks at 32 bits."""
        said = f"{self.config.seed} {step} {rank}"
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=4).digest())

    def is_due(self, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the distance is to be measured after so many steps; it may have been interrupted before."""
        return not history or (step in self._validations() and history[-1]["step"] < step)

    def out_of_patience(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Why a training is to end early; empty where it is not."""
        since = len(history) - 1 - min(range(len(history)), key=lambda k: history[k]["validated"])
        if self.config.patience and since >= self.config.patience:
            text = " and the text's own loss" if self.config.objective.needs_labels else ""
            return f"the distance to the original{text} on the validation part was no lower {since} times"
        return ""

    def _validations(self) -> set[int]:
        count = min(self.config.validations, self.steps)
        return {round(self.steps * k / count) for k in range(1, count + 1)}
