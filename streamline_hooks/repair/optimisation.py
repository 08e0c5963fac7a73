"""How what is trained is changed: AdamW at a rate that rises and falls, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.master_weights import MasterWeights


class Optimisation:
    """The steps of an optimiser, which can be gone on from.

    Parameters
    ----------
    parameters : mapping of str to torch.nn.Parameter
        What is trained.
    config : DistillationConfig
    steps : int
        In all.
    rate_of : callable
        The share of the learning rate that a parameter of a name is trained at.

    Attributes
    ----------
    weights : MasterWeights
        Whose gradients are followed.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: DistillationConfig,
        steps: int,
        rate_of: Callable[[str], float],
    ) -> None:
        from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup  # late: it brings in much

        self.weights, self.max_grad_norm = MasterWeights(parameters), config.max_grad_norm
        groups = self._groups(config, rate_of)
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        self.schedule: Any = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimiser,
            num_warmup_steps=min(math.ceil(config.warmup_ratio * steps), steps - 1),  # the first has rate 0
            num_training_steps=steps,
            min_lr_rate=config.min_lr_ratio,
        )

    def _groups(self, config: DistillationConfig, rate_of: Callable[[str], float]) -> list[dict[str, Any]]:
        """What is trained at the same rate, and with the same decay: matrices have some, vectors none."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, master in self.weights.masters.items():
            decay = config.weight_decay if master.ndim > 1 else 0.0
            groups.setdefault((config.learning_rate * rate_of(name), decay), []).append(master)
        return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]

    def step(self) -> None:
        """Change the weights by the gradients that they have."""
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.weights.masters.values(), self.max_grad_norm)
        self.optimiser.step()
        self.weights.hand_on()
        self.schedule.step()

    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept for going on later, by name; with what `said` says."""
        state = self.optimiser.state_dict()["state"]
        held = {f"optimiser.{number}.{name}": value for number, its in state.items() for name, value in its.items()}
        return {f"parameter.{name}": p.detach() for name, p in self.weights.masters.items()} | held

    def said(self) -> dict[str, Any]:
        """The JSON values of the same."""
        return {
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "rates": [group["lr"] for group in self.optimiser.param_groups],
        }

    def load(self, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        """Go on from what an optimisation of the same parameters kept."""
        self.weights.load({name: tensors[f"parameter.{name}"] for name in self.weights.masters})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, number, name = key.split(".", 2)
                state.setdefault(int(number), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.schedule.load_state_dict({**self.schedule.state_dict(), **said["schedule"]})
        for group, rate in zip(self.optimiser.param_groups, said["rates"], strict=True):
            group["lr"] = rate
