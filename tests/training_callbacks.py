"""Callbacks with which tests observe or stop a training run."""

from __future__ import annotations

from collections.abc import Callable

from streamline_hooks.distillation import TrainingCallback, TrainingProgress


class BeforeSteps(TrainingCallback):
    """Call a function before every step."""

    def __init__(self, action: Callable[[TrainingProgress], object]) -> None:
        self.action = action

    def on_step_begin(self, progress: TrainingProgress) -> None:
        self.action(progress)


class RaiseAt(TrainingCallback):
    """Raise an exception instead of making a step, counted from 0."""

    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_step_begin(self, progress: TrainingProgress) -> None:
        if progress.step == self.step:
            raise self.error
