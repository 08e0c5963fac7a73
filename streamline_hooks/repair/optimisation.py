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


_WIDE = (torch.float32, torch.float64)


class MasterWeights:
    """What an optimiser changes: the parameters themselves, or copies of those that are narrower than float32.

    Parameters
    ----------
    parameters : mapping of str to torch.nn.Parameter
        Those of the model.

    Attributes
    ----------
    masters : dict of str to torch.nn.Parameter
        Of each its float32 copy, or itself.

    Examples
    --------
    >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> weights = MasterWeights({"weight": weight})
    >>> weight.grad = torch.ones(1, dtype=torch.bfloat16)
    >>> weights.collect()
    >>> optimiser = torch.optim.SGD(weights.masters.values(), lr=1e-3)
    >>> for _ in range(4):
    ...     optimiser.step()
    >>> weights.hand_on()
    >>> round(weights.masters["weight"].item(), 4), weight.item()
    (0.996, 0.99609375)
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.masters = {
            name: p if p.dtype in _WIDE else nn.Parameter(p.detach().to(torch.float32))
            for name, p in self.parameters.items()
        }

    def collect(self) -> None:
        """Add the gradients of the model's parameters to those of the copies."""
        for parameter, master in self._narrow():
            if parameter.grad is not None:
                given = parameter.grad.to(torch.float32)
                master.grad = given if master.grad is None else master.grad.add_(given)
                parameter.grad = None

    def hand_on(self) -> None:
        """Give the model's parameters the values of the copies."""
        with torch.no_grad():
            for parameter, master in self._narrow():
                parameter.copy_(master)

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take values up again, by name."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(values[name])
        self.hand_on()

    def _narrow(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = ((self.parameters[name], master) for name, master in self.masters.items())
        return [(parameter, master) for parameter, master in pairs if master is not parameter]


@contextmanager
def narrowed_once(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[int]:
    """Let linear layers without gradients take their products in the dtype that autocast would.

    Autocast narrows a weight that has no gradient anew at each use, which for a few sequences takes as long as the
    products themselves. What comes out is the same to the bit; outside autocast of this dtype a layer is as it was.

    Parameters
    ----------
    modules : iterable of torch.nn.Module
        What they contain is looked through. Layers that are trained, or kept elsewhere than in memory, stay.
    dtype : torch.dtype or None
        That of the autocast; None where there is none, and nothing is done.

    Yields
    ------
    int
        Bytes that the narrow copies take.

    Examples
    --------
    >>> layer, state = nn.Linear(4, 4).requires_grad_(False), torch.ones(1, 4)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     expected = layer(state)
    ...     with narrowed_once([layer], torch.bfloat16) as taken:
    ...         print(taken, torch.equal(layer(state), expected))
    40 True
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
