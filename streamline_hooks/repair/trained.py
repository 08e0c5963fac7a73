"""Result of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Trained:
    """How a training went. The modules hold the best weights that were seen.

    Attributes
    ----------
    steps, tokens : int
        That were made, and those of the batches they were made on; of a model that is given images, those.
    distance_before, distance : float
        How far what is said is from what the original says on the validation part (`Task.distance`), such as
        KL(original ‖ repaired) in nats a token, before the first step and with the best weights. Where something else
        is minimised too (``lm``, ``reverse_kl``), those are the best by all together, see `Objective.validated`.
    best_step : int
        After which those were.
    history : list of dict
        Each validation: ``step``, ``tokens``, ``distance``, by what weights are kept (``validated``), and the mean
        training ``loss`` since the one before.
    seconds : float
        Of the training itself; those before an interruption count.
    stopped : str
        Why it ended before all steps were made; empty where it did not.
    measure : str
        What the distances are, in words.
    unit : str
        What was counted as tokens.
    """

    steps: int
    tokens: int
    distance_before: float
    distance: float
    best_step: int
    history: list[dict[str, Any]]
    seconds: float
    stopped: str = ""
    measure: str = "KL (nats a token)"
    unit: str = "token"

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the training run."""
        return self.stopped.startswith("interrupted")

    @property
    def in_vain(self) -> str:
        """Return why the run brought nothing, or an empty string."""
        if self.stopped and not self.steps:
            return f"The training made no step: {self.stopped}."
        later = [row["validated"] for row in self.history if row["step"]]
        if self.stopped and not later:
            return (
                f"The training brought nothing: {self.stopped}, before it was looked at what it had reached, so that "
                "the weights from before it are kept."
            )
        if self.best_step or not later:
            return ""
        first = self.history[0]
        alone = first["validated"] == first["distance"]
        what = self.measure.partition(" (")[0] if alone else "what it minimises, on the validation text,"
        return (
            f"The training brought nothing: {what} was {first['validated']:.4f} "
            f"before its first step and {min(later):.4f} at best afterwards, so that the weights from before it are "
            "kept. "
            "Give more text, or a smaller learning rate (a large one throws off what starts well)."
        )

    def report(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        early = f", ended early: {self.stopped}" if self.stopped else ""
        return (
            f"{self.steps} steps on {self.tokens:,} {self.unit}s in {self.seconds:.0f} s: "
            f"{self.measure.partition(' (')[0]} {self.distance_before:.4f} -> {self.distance:.4f}, of step "
            f"{self.best_step}{early}"
        )
