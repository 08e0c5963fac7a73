"""Callbacks of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a training run, as callbacks receive it.

    Attributes
    ----------
    step, steps : int
        Steps made so far, and in total.
    tokens : int
        Tokens trained on so far.
    batches : tuple of int
        Indices of the calibration batches of the current step.
    loss : float or None
        Loss of the step that ended; None in the other callbacks.
    history : sequence of mapping
        The validations so far, see `Trained.history`.
    """

    step: int
    steps: int
    tokens: int
    batches: tuple[int, ...]
    loss: float | None
    history: Sequence[Mapping[str, Any]]


class TrainingCallback:
    """Base class of the callbacks of a training run; override the methods you need.

    Pass instances as ``train(..., callbacks=[...])``. In a distributed run every rank calls its own callbacks. An
    exception ends the run like an exception of the step itself; KeyboardInterrupt stops it and keeps the best weights.
    Callbacks are not part of the run's identity: a run can be resumed with other ones.

    Examples
    --------
    >>> class PrintLoss(TrainingCallback):
    ...     def on_step_end(self, progress):
    ...         print(progress.step, progress.loss)
    >>> callbacks = [PrintLoss()]
    """

    def on_step_begin(self, progress: TrainingProgress) -> None:
        """Run before each step of the optimizer."""

    def on_step_end(self, progress: TrainingProgress) -> None:
        """Run after each step of the optimizer, and after a step that was dropped because its loss is not finite."""

    def on_validation_begin(self, progress: TrainingProgress) -> None:
        """Run before each validation."""

    def on_validation_end(self, progress: TrainingProgress) -> None:
        """Run after each validation; ``progress.history[-1]`` is its result."""
