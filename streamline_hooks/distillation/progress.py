"""Callbacks, progress and result of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a training run, the argument of the callbacks.

    Attributes
    ----------
    step, steps : int
        Completed and total optimizer steps.
    tokens : int
        Tokens trained on so far.
    batches : tuple of int
        Indices of the calibration batches of the current step.
    loss : float or None
        Loss of the completed step in `TrainingCallback.on_step_end`; None in the other callbacks.
    history : sequence of mapping
        Results of the validations so far, see `TrainingResult.history`.

    Examples
    --------
    >>> progress = TrainingProgress(step=3, steps=10, tokens=96, batches=(4,), loss=0.5, history=[])
    >>> progress.step / progress.steps
    0.3
    """

    step: int
    steps: int
    tokens: int
    batches: tuple[int, ...]
    loss: float | None
    history: Sequence[Mapping[str, Any]]


class TrainingCallback:
    """Base class of the callbacks of a training run. Override the methods that you need.

    Pass instances as ``train(..., callbacks=[...])``. In a distributed run every rank calls its callbacks. An exception
    in a callback ends the run with an error, except KeyboardInterrupt, which stops the run and keeps the best weights.
    A run can be resumed with other callbacks.

    Examples
    --------
    >>> class PrintLoss(TrainingCallback):
    ...     def on_step_end(self, progress):
    ...         print(progress.step, progress.loss)
    >>> callbacks = [PrintLoss()]
    """

    def on_step_begin(self, progress: TrainingProgress) -> None:
        """Run before each optimizer step."""

    def on_step_end(self, progress: TrainingProgress) -> None:
        """Run after each optimizer step, and after a step that was dropped because its loss is not finite."""

    def on_validation_begin(self, progress: TrainingProgress) -> None:
        """Run before each validation."""

    def on_validation_end(self, progress: TrainingProgress) -> None:
        """Run after each validation; ``progress.history[-1]`` is its result."""


@dataclass
class TrainingResult:
    """Result of a training run. The trained modules contain the best weights.

    Attributes
    ----------
    steps, tokens : int
        Optimizer steps, and tokens (or images) of their batches.
    distance_before, distance : float
        Distance between the outputs of student and teacher on the validation data (`Task.distance`), for example
        KL(original ‖ repaired) in nats per token: before the first step, and with the best weights. The best weights
        have the lowest `Objective.validated`.
    best_step : int
        Step of the best weights.
    history : list of dict
        One entry per validation: ``step``, ``tokens``, ``distance``, ``validated`` (the validation loss), and ``loss``
        (the mean training loss since the previous validation).
    seconds : float
        Duration of steps and validations, including those before an interruption.
    stopped : str
        Reason why the run ended early; empty if it did not.
    measure : str
        Name and unit of the distance.
    unit : str
        Unit that `tokens` counts.

    Examples
    --------
    >>> print(TrainingResult(8, 4096, 0.61, 0.25, best_step=8, history=[], seconds=12))
    8 steps on 4,096 tokens in 12 s: KL 0.6100 -> 0.2500, of step 8
    """

    steps: int
    tokens: int
    distance_before: float
    distance: float
    best_step: int
    history: list[dict[str, Any]]
    seconds: float
    stopped: str = ""
    measure: str = "KL (nats per token)"
    unit: str = "token"

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the training run."""
        return self.stopped.startswith("interrupted")

    @property
    def warning(self) -> str:
        """Return why the run did not improve the model or was not completed, or an empty string."""
        if self.stopped and not self.steps:
            return f"The training run made no step: {self.stopped}."
        later_losses = [row["validated"] for row in self.history if row["step"]]
        if self.stopped and not later_losses:
            return (
                f"The training run did not improve the model: {self.stopped}, before the first validation. The initial "
                "weights are kept."
            )
        if self.best_step and self.stopped.startswith(("interrupted", "the loss")):
            return f"The training run ended early: {self.stopped}. The best weights are kept, of step {self.best_step}."
        if self.best_step or not later_losses:
            return ""
        first = self.history[0]
        is_distance = first["validated"] == first["distance"]
        measure = self.measure.partition(" (")[0] if is_distance else "the validation loss"
        return (
            f"The training run did not improve the model: {measure} was {first['validated']:.4f} before the first step "
            f"and {min(later_losses):.4f} at best afterwards. The initial weights are kept. Use more calibration data "
            "or a smaller learning rate."
        )

    def report(self) -> dict[str, Any]:
        """Return all fields as values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        early = f", ended early: {self.stopped}" if self.stopped else ""
        return (
            f"{self.steps} steps on {self.tokens:,} {self.unit}s in {self.seconds:.0f} s: "
            f"{self.measure.partition(' (')[0]} {self.distance_before:.4f} -> {self.distance:.4f}, of step "
            f"{self.best_step}{early}"
        )
