"""Config of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from streamline_hooks.core import Bound, Config, FrozenDict
from streamline_hooks.distillation.losses import Objective


@dataclass(frozen=True)
class DistillationConfig(Config):
    """Describe a training run: AdamW with linear warm-up and cosine decay of the learning rate.

    Attributes
    ----------
    loss : mapping of str to float
        Weight of each loss by name, above 0; see `LOSSES`. On the command line nothing is trained without a loss.
        ``DistillationConfig()`` uses ``{"kl": 1.0}``, the KL divergence from the original model.
    learning_rate : float
        Peak learning rate; default 1e-3, for new modules that start from the closed form. Trained blocks need a lower
        rate, see `HealingConfig.learning_rate_ratio`.
    scale_parameter : bool
        Multiply the learning rate of each matrix by the magnitude of the model's weights; default True. AdamW changes
        all entries by about the learning rate, and models differ in the root mean square of their weights: about 0.19
        in SmolLM2-135M, for which the default rates were chosen, and 0.015 in Qwen2.5-Coder-0.5B. The rate of a matrix
        in a healed or inherited block is multiplied by its root mean square divided by 0.2, as in Adafactor (arXiv
        1804.04235, section 8), and that of a matrix in a new module by the median over the matrices of the first
        changed block, divided by 0.2. The rates of norms, biases and adapters are not scaled.
    weight_decay : float
        Weight decay of AdamW for matrices; default 0.01. Vectors (norms, biases, scales) are not decayed.
    betas : tuple of float
        Coefficients of the running averages of AdamW, at least 0 and below 1; default (0.9, 0.95). The second is lower
        than AdamW's default 0.999 because runs are short.
    warmup_ratio : float
        Fraction of the steps in which the learning rate rises from 0; default 0.03.
    min_lr_ratio : float
        Learning rate at the last step as a fraction of the peak; default 0.05.
    max_grad_norm : float
        Maximum norm of the gradients; default 1.0. 0 disables clipping.
    epochs : float
        Number of passes over the calibration data, at least 1; default 1. 1.5 uses half of the batches twice.
    gradient_accumulation_steps : int
        Batches per optimizer step; default 1. More batches do not need more memory.
    validations : int
        Number of evenly spaced validations after the one before the first step; default 8. Each is a forward pass over
        the validation data. The weights with the lowest validation loss are kept.
    patience : int
        Number of validations without a lower loss after which the run ends; default 0, which disables early stopping.
    max_minutes : float, optional
        Time limit in minutes for the teacher's forward pass, steps and validations, including the time before an
        interruption. At the limit the run validates and ends. None, the default, sets no limit.
    checkpoint_minutes : float
        Minutes between two writes of the checkpoint file; default 5.0. 0 writes it after each step.
    seed : int, optional
        Seed of the batch order, dropout and sampling; by default the seed of the compression, and 0 in `train`.

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
    scale_parameter: bool = True
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
        """The weighted sum of the losses."""
        return Objective(self.loss)

    def seeded(self, seed: int) -> DistillationConfig:
        """Return this config, with `seed` if its own seed is None."""
        return replace(self, seed=seed) if self.seed is None else self
