"""How a repair is trained, and how that went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from streamline_hooks.arguments import check_fields
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.callbacks import TrainingCallback
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.on_policy import OnPolicy


@dataclass(frozen=True)
class Training:
    """How a repair is trained: AdamW, warm-up, cosine to a floor.

    Attributes
    ----------
    objective : Objective
        What is compared on the calibration text.
    on_policy : OnPolicy or None
        Which steps are made on what the repaired model writes itself, and how.
    learning_rate : float
        At its highest.
    weight_decay : float
        Of matrices; vectors (norms, biases, scales) have none.
    betas : tuple of float
    warmup, floor : float
        Share of the steps in which the rate rises from 0, and share of the rate that it falls to.
    clip : float
        The greatest norm of the gradient; 0 for any.
    epochs : float
        How often each batch is seen: 1.5 lets half of them be seen a second time.
    accumulation : int
        Batches a step.
    autocast : torch.dtype or None
        Precision of the matrix products, for instance bfloat16, those of the original on the calibration text among
        them; by default that of the weights. Weights that are not trained are kept in it besides, while it lasts.
    validations : int
        How often the distance to the original is measured on the validation part, evenly, after the first time before
        the first step.
    patience : int
        Stop after so many validations without a lower one; 0 for never.
    seed : int
        Of the order of the batches, and of dropout.
    memory : int
        Bytes that what the original does on the calibration text may take in memory, and as many for the validation
        text, before files take it.
    state_dtype : torch.dtype or None
        As what they are kept.
    keep_in : str, Path or None
        A file to go on from after an interruption, kept as a `Path`.
    keep_every : float
        Minutes between two writings of it.
    callbacks : sequence of TrainingCallback
        Called before and after each step and each validation.
    minutes : float or None
        That the original's pass, the steps and validations may take, steps before an interruption among them; a
        training that is not at its end by then validates and ends.
    """

    objective: Objective = field(default_factory=Objective)
    on_policy: OnPolicy | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.03
    floor: float = 0.05
    clip: float = 1.0
    epochs: float = 1
    accumulation: int = 1
    autocast: torch.dtype | None = None
    validations: int = 8
    patience: int = 0
    seed: int = 0
    memory: int = 2**31
    state_dtype: torch.dtype | None = None
    keep_in: Path | None = None
    keep_every: float = 5.0
    minutes: float | None = None
    callbacks: Sequence[TrainingCallback] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        keep_in: Any = self.keep_in
        if isinstance(keep_in, str):
            object.__setattr__(self, "keep_in", Path(keep_in))
        check_fields(self)
        least = {"epochs": 1, "accumulation": 1, "validations": 1, "patience": 0, "memory": 0}
        wrong = [name for name, bound in least.items() if not bound <= getattr(self, name) < math.inf]
        wrong += [name for name in ("learning_rate",) if not 0 < getattr(self, name) < math.inf]
        wrong += [] if self.weight_decay < math.inf else ["weight_decay"]
        wrong += [] if all(0 <= beta < 1 for beta in self.betas) else ["betas"]
        wrong += [n for n in ("weight_decay", "clip", "keep_every") if not getattr(self, n) >= 0]
        wrong += [name for name in ("warmup", "floor") if not 0 <= getattr(self, name) <= 1]
        if self.minutes is not None and not self.minutes > 0:
            raise StreamlineError(
                f"minutes={self.minutes!r} is no time to train in; expected more than 0, or None for no end to it."
            )
        if wrong:
            raise StreamlineError(
                f"{wrong[0]}={getattr(self, wrong[0])!r} makes no training. Expected epochs, accumulation and "
                "validations of 1 or more, a learning rate above 0, warmup and floor in 0 to 1, betas from "
                "0 to below 1, and nothing negative."
            )

    def products(self, device: torch.device) -> AbstractContextManager[Any]:
        """What matrix products are made in."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


@dataclass
class Trained:
    """How a training went. The modules hold the best weights that were seen.

    Attributes
    ----------
    steps, tokens : int
        That were made, and those of the batches they were made on; of a model that is given images, those. Steps on the
        model's own text take prompts from their batches alone.
    distance_before, distance : float
        How far what is said is from what the original says on the validation part (`Task.distance`), such as
        KL(original ‖ repaired) in nats a token, before the first step and with the best weights. Where something else
        is minimised too (``lm``, ``reverse_kl``), those are the best by all together, see `Objective.validated`.
    best_step : int
        After which those were.
    history : list of dict
        Each validation: ``step``, ``tokens``, ``distance``, by what weights are kept (``validated``), and the mean
        training ``loss`` on the calibration text since the one before; of a training on its own texts also
        ``own_loss`` there, the share of them that was not cut (``whole``), and their present ``length``.
    seconds : float
        Of the training itself; those before an interruption count.
    stopped : str
        Why it ended before all steps were made; empty where it did not.
    measure : str
        What the distances are, in words.
    unit : str
        What was counted as tokens.
    written : int
        New tokens that the repaired model wrote itself, in the steps whose calibration text gave the prompts alone.
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
    written: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the training run."""
        return self.stopped.startswith("interrupted")

    @property
    def in_vain(self) -> str:
        """That no step brought anything, or none was made, in words; empty where one did."""
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
        """Everything, as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        early = f", ended early: {self.stopped}" if self.stopped else ""
        own = f" and {self.written:,} of its own" if self.written else ""
        return (
            f"{self.steps} steps on {self.tokens:,} {self.unit}s{own} in {self.seconds:.0f} s: "
            f"{self.measure.partition(' (')[0]} {self.distance_before:.4f} -> {self.distance:.4f}, of step "
            f"{self.best_step}{early}"
        )
