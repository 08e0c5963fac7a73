"""Config of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from streamline_hooks.core.config import Bound, Config, FrozenDict
from streamline_hooks.repair.objective import Objective


@dataclass(frozen=True)
class DistillationConfig(Config):
    """Describe how a repair is trained: by AdamW, with a linear warm-up and a cosine decay of the learning rate.

    Attributes
    ----------
    loss : mapping of str to float
        Weights of the losses by name, see `LOSSES`; above 0. The default is the KL divergence from the original,
        ``{"kl": 1.0}``, which asks for everything that the original might generate.
    learning_rate : float
        The highest learning rate; default 1e-3, for new modules that start from the closed form. A trained block
        needs less, see `HealingConfig.learning_rate_ratio`.
    weight_decay : float
        Weight decay of AdamW for matrices; default 0.01. Vectors (norms, biases, scales) have none.
    betas : tuple of float
        Coefficients of the running averages of AdamW, at least 0 and below 1; default (0.9, 0.95), whose second is
        lower than AdamW's own 0.999 since runs are short.
    warmup_ratio : float
        Fraction of the steps in which the learning rate rises from 0; default 0.03.
    min_lr_ratio : float
        Learning rate at the last step, as a fraction of the highest one; default 0.05.
    max_grad_norm : float
        Norm to which gradients are clipped; default 1.0. 0 clips nothing.
    epochs : float
        Number of passes over the calibration text, at least 1; default 1. 1.5 uses half of the batches twice.
    gradient_accumulation_steps : int
        Batches per step of the optimizer; default 1. More make the batch larger without more memory.
    validations : int
        Number of validations, at equal distances, after the one before the first step; default 8. The weights with
        the lowest loss are kept, and each validation takes a forward pass over the validation text.
    patience : int
        Number of validations without a lower loss after which the run ends; 0, the default, never ends it early.
    max_minutes : float, optional
        Minutes for the teacher's forward pass, steps and validations, those before an interruption included. A run
        that takes longer validates and ends. None, the default, sets no limit.
    checkpoint_minutes : float
        Minutes between two writes of the file to resume from; default 5.0. 0 writes it after each step.
    seed : int, optional
        Seed of the order of the batches, of dropout and of sampling; by default the seed of the compression, and 0 in
        `train`.

    Raises
    ------
    StreamlineError
        If a value is invalid.

    Examples
    --------
    >>> config = DistillationConfig(loss={"kl": 1.0, "lm": 0.5}, epochs=2)
    >>> DistillationConfig.from_dict(config.to_dict()) == config
    True
    """

    bounds: ClassVar[Mapping[str, Bound]] = {
        "learning_rate": "(0, inf)",
        "weight_decay": 0,
        "betas": "[0, 1)",
        "warmup_ratio": "[0, 1]",
        "min_lr_ratio": "[0, 1]",
        "max_grad_norm": 0,
        "epochs": 1,
        "gradient_accumulation_steps": 1,
        "validations": 1,
        "patience": 0,
        "max_minutes": "(0, inf)",
        "checkpoint_minutes": 0,
    }

    loss: Mapping[str, float] = field(default_factory=lambda: {"kl": 1.0})
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.05
    max_grad_norm: float = 1.0
    epochs: float = 1
    gradient_accumulation_steps: int = 1
    validations: int = 8
    patience: int = 0
    max_minutes: float | None = None
    checkpoint_minutes: float = 5.0
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "loss", FrozenDict(Objective(self.loss).weights))

    @cached_property
    def objective(self) -> Objective:
        """The losses as one function."""
        return Objective(self.loss)

    def seeded(self, seed: int) -> DistillationConfig:
        """Return this config with a seed, if it has none of its own."""
        return replace(self, seed=seed) if self.seed is None else self
