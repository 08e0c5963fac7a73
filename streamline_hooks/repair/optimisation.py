"""Optimiser steps, float32 master weights, and the schedule of a training run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from streamline_hooks.repair.distillation_config import DistillationConfig


class Course:
    """Schedule of a training run: the batches of each step, and when to validate or end. It follows from the config."""

    def __init__(self, config: DistillationConfig, batches: int) -> None:
        self.config, self._batches = config.seeded(0), batches
        self._a_epoch = math.ceil(batches / config.gradient_accumulation_steps)
        self.steps = round(config.epochs * self._a_epoch)

    def batches_of(self, step: int) -> list[int]:
        """Return the batches of a step; each epoch shuffles them by the seed."""
        size = self.config.gradient_accumulation_steps
        epoch, place = divmod(step, self._a_epoch)
        generator = torch.Generator().manual_seed((self.config.seed or 0) + epoch)
        order = torch.randperm(self._batches, generator=generator).tolist()
        return order[place * size : (place + 1) * size]

    def seed_of(self, step: int, rank: int) -> int:
        """Return the 32-bit seed of one rank in a step."""
        said = f"{self.config.seed} {step} {rank}"
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=4).digest())

    def is_due(self, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a validation is due after `step` steps; the run may have been resumed."""
        return not history or (step in self._validations() and history[-1]["step"] < step)

    def out_of_patience(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Return why the run ends early, or an empty string."""
        since = len(history) - 1 - min(range(len(history)), key=lambda k: history[k]["validated"])
        if self.config.patience and since >= self.config.patience:
            text = " and the text's own loss" if self.config.objective.needs_labels else ""
            return f"the distance to the original{text} on the validation part was no lower {since} times"
        return ""

    def _validations(self) -> set[int]:
        count = min(self.config.validations, self.steps)
        return {round(self.steps * k / count) for k in range(1, count + 1)}


_WIDE = (torch.float32, torch.float64)


class MasterWeights:
    """Float32 copies (`masters`) of parameters in half precision; wider parameters are their own masters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.masters = {
            name: p if p.dtype in _WIDE else nn.Parameter(p.detach().to(torch.float32))
            for name, p in self.parameters.items()
        }

    def collect(self) -> None:
        """Add the gradients of the parameters to those of the masters."""
        for parameter, master in self._narrow():
            if parameter.grad is not None:
                given = parameter.grad.to(torch.float32)
                master.grad = given if master.grad is None else master.grad.add_(given)
                parameter.grad = None

    def hand_on(self) -> None:
        """Copy the masters to the parameters."""
        with torch.no_grad():
            for parameter, master in self._narrow():
                parameter.copy_(master)

    def clear(self) -> None:
        """Remove all gradients."""
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Load values by name."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(values[name])
        self.hand_on()

    def _narrow(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = ((self.parameters[name], master) for name, master in self.masters.items())
        return [(parameter, master) for parameter, master in pairs if master is not parameter]


@contextmanager
def narrowed_once(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[int]:
    """Let frozen linear layers keep a copy in the dtype of autocast, which otherwise casts them at each use.

    The products are bit-identical. Yields the bytes of the copies; does nothing if `dtype` is None.
    """
    apart = (dtype, torch.float64)  # autocast leaves these as they are
    narrowed = [] if dtype is None else [layer for layer in _frozen(modules) if layer.weight.dtype not in apart]
    taken = 0
    try:
        for layer in narrowed:
            try:
                weight, bias = (None if t is None else t.detach().to(dtype) for t in (layer.weight, layer.bias))
            except torch.cuda.OutOfMemoryError:
                break  # the others are narrowed at each use
            taken += sum(t.nbytes for t in (weight, bias) if t is not None)
            layer.forward = _product(layer, weight, bias)  # type: ignore[method-assign]
        yield taken
    finally:
        for layer in narrowed:
            layer.__dict__.pop("forward", None)


def _frozen(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    found = {part: None for module in modules for part in module.modules() if type(part) is nn.Linear}
    return [
        layer
        for layer in found
        if "forward" not in layer.__dict__  # accelerate has put one in, which brings the weights
        and not any(p.requires_grad or p.is_meta or type(p.data) is not Tensor for p in layer.parameters())
    ]


def _product(layer: nn.Linear, weight: Any, bias: Any) -> Any:
    def forward(given: Tensor) -> Tensor:
        kind = given.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == weight.dtype:
            return linear(given, weight, bias)
        return nn.Linear.forward(layer, given)

    return forward


class Optimisation:
    """AdamW with warm-up and cosine decay on master weights; `rate_of` maps a name to a share of the rate."""

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
        """Group parameters by rate and weight decay, which vectors do not have."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, master in self.weights.masters.items():
            decay = config.weight_decay if master.ndim > 1 else 0.0
            groups.setdefault((config.learning_rate * rate_of(name), decay), []).append(master)
        return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]

    def step(self) -> None:
        """Clip gradients and update the weights."""
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.weights.masters.values(), self.max_grad_norm)
        self.optimiser.step()
        self.weights.hand_on()
        self.schedule.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state by name."""
        state = self.optimiser.state_dict()["state"]
        held = {f"optimiser.{number}.{name}": value for number, its in state.items() for name, value in its.items()}
        return {f"parameter.{name}": p.detach() for name, p in self.weights.masters.items()} | held

    def said(self) -> dict[str, Any]:
        """Return the JSON values of the state."""
        return {
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "rates": [group["lr"] for group in self.optimiser.param_groups],
        }

    def load(self, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        """Load a state."""
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
