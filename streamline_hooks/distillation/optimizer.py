"""Optimizer, float32 master weights and schedule of a training run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from streamline_hooks.core import HardwareConfig, StreamlineError
from streamline_hooks.distillation.config import DistillationConfig


def refuse_float16(modules: Iterable[nn.Module], hardware: HardwareConfig) -> None:
    """Raise if gradients would pass through float16, in which small ones become 0."""
    in_weights = any(p.dtype == torch.float16 for module in modules for p in module.parameters())
    if in_weights or hardware.autocast_dtype == torch.float16:
        problem = "The weights are float16" if in_weights else "autocast is float16"
        raise StreamlineError(
            f"{problem}, in which small gradients become 0. Expected bfloat16 or float32 for training. "
            + ("Load the model with one of them." if in_weights else "Use autocast='bfloat16', or leave it out.")
        )


class TrainingSchedule:
    """The batches of each step, and when to validate or end, as determined by the config."""

    def __init__(self, config: DistillationConfig, batches: int) -> None:
        self.config, self._batches = config.seeded(0), batches
        self._steps_per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
        self.steps = round(config.epochs * self._steps_per_epoch)

    def batches_of(self, step: int) -> list[int]:
        """Return the batch indices of a step; each epoch is shuffled with a seed of its number."""
        size = self.config.gradient_accumulation_steps
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        generator = torch.Generator().manual_seed((self.config.seed or 0) + epoch)
        order = torch.randperm(self._batches, generator=generator).tolist()
        return order[step_in_epoch * size : (step_in_epoch + 1) * size]

    def seed_of(self, step: int, rank: int) -> int:
        """Return the 32-bit random seed of a rank in a step."""
        return int.from_bytes(hashlib.blake2b(f"{self.config.seed} {step} {rank}".encode(), digest_size=4).digest())

    def is_due(self, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a validation is due after `step` steps."""
        count = min(self.config.validations, self.steps)
        due = {round(self.steps * k / count) for k in range(1, count + 1)}
        return not history or (step in due and history[-1]["step"] < step)

    def out_of_patience(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Return why the run ends early, or an empty string if it does not."""
        since = len(history) - 1 - min(range(len(history)), key=lambda k: history[k]["validated"])
        if self.config.patience and since >= self.config.patience:
            text = " plus the language-modeling loss" if self.config.objective.needs_labels else ""
            count = f"{since} validation{'s' * (since > 1)}"
            return f"the distance to the original{text} on the validation data was no lower for {count}"
        return ""


class MasterWeights:
    """Float32 copies (`masters`) of 16-bit parameters; float32 and float64 parameters are used directly."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        full_precision = (torch.float32, torch.float64)
        self.masters = {
            name: p if p.dtype in full_precision else nn.Parameter(p.detach().to(torch.float32))
            for name, p in self.parameters.items()
        }
        pairs = zip(self.parameters.values(), self.masters.values(), strict=True)
        self._copied_pairs = [(parameter, master) for parameter, master in pairs if master is not parameter]

    def collect(self) -> None:
        """Move the gradients of the parameters to the masters."""
        for parameter, master in self._copied_pairs:
            if parameter.grad is not None:
                gradient = parameter.grad.to(torch.float32)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def copy_to_parameters(self) -> None:
        """Copy the masters to the parameters."""
        with torch.no_grad():
            for parameter, master in self._copied_pairs:
                parameter.copy_(master)

    def clear(self) -> None:
        """Remove all gradients."""
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Load master weights by name."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(values[name])
        self.copy_to_parameters()


@contextmanager
def cached_autocast_weights(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[int]:
    """Cache frozen linear weights in the autocast dtype, which autocast would otherwise cast in every forward.

    The results are bit-identical. Yield the bytes of the copies. Without a `dtype` nothing is cached.
    """
    excluded_dtypes = (dtype, torch.float64)  # autocast does not cast these
    linears = {layer: None for module in modules for layer in module.modules() if type(layer) is nn.Linear}
    cached_layers = [
        layer
        for layer in (linears if dtype is not None else ())
        if layer.weight.dtype not in excluded_dtypes
        and "forward" not in layer.__dict__  # Accelerate replaces forward to load offloaded weights
        and not any(p.requires_grad or p.is_meta or type(p.data) is not Tensor for p in layer.parameters())
    ]
    copied_bytes = 0
    try:
        for layer in cached_layers:
            try:
                weight, bias = (None if t is None else t.detach().to(dtype) for t in (layer.weight, layer.bias))
            except torch.cuda.OutOfMemoryError:
                break  # autocast casts the remaining layers in every forward
            copied_bytes += sum(t.nbytes for t in (weight, bias) if t is not None)
            layer.forward = _cached_forward(layer, weight, bias)  # type: ignore[method-assign]
        yield copied_bytes
    finally:
        for layer in cached_layers:
            layer.__dict__.pop("forward", None)


def _cached_forward(layer: nn.Linear, weight: Any, bias: Any) -> Any:
    cached = layer.weight, layer.bias

    def forward(states: Tensor) -> Tensor:
        device_type = states.device.type
        is_cast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == weight.dtype
        if is_cast and layer.weight is cached[0] and layer.bias is cached[1]:  # a fold exchanges them
            return linear(states, weight, bias)
        return nn.Linear.forward(layer, states)

    return forward


class TrainingOptimizer:
    """AdamW with warm-up and cosine decay on master weights; `learning_rate_factor` scales the rate of a parameter."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: DistillationConfig,
        steps: int,
        learning_rate_factor: Callable[[str], float],
    ) -> None:
        self.weights, self.max_grad_norm = MasterWeights(parameters), config.max_grad_norm
        self._config, self._steps = config, steps
        self._begin({name: learning_rate_factor(name) for name in self.weights.masters})

    def _begin(self, factors: dict[str, float]) -> None:
        """Create optimizer and schedule for the factors of the learning rate by parameter."""
        from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup  # slow import

        self.factors, config, steps = factors, self._config, self._steps
        groups: dict[tuple[float, float], list[Tensor]] = {}  # by rate and weight decay; vectors are not decayed
        for name, master in self.weights.masters.items():
            decay = config.weight_decay if master.ndim > 1 else 0.0
            groups.setdefault((config.learning_rate * factors[name], decay), []).append(master)
        param_groups = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
        # On a CPU the fused update needs one pass over the memory; on CUDA the default is as fast. It ignores strides.
        fused = all(
            p.device.type == "cpu" and type(p.data) is Tensor and p.is_contiguous()
            for p in self.weights.masters.values()
        )
        self.optimizer = torch.optim.AdamW(
            param_groups, lr=config.learning_rate, betas=config.betas, fused=fused or None
        )
        self.schedule: Any = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimizer,
            num_warmup_steps=min(math.ceil(config.warmup_ratio * steps), steps - 1),  # the first step has rate 0
            num_training_steps=steps,
            min_lr_rate=config.min_lr_ratio,
        )

    def step(self) -> None:
        """Clip the gradients and update weights and learning rate."""
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.weights.masters.values(), self.max_grad_norm)
        self.optimizer.step()
        self.weights.copy_to_parameters()
        self.schedule.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state by name, including master weights."""
        state = self.optimizer.state_dict()["state"]
        optimizer_tensors = {
            f"optimiser.{number}.{name}": value for number, values in state.items() for name, value in values.items()
        }
        return {f"parameter.{name}": p.detach() for name, p in self.weights.masters.items()} | optimizer_tensors

    def json_state(self) -> dict[str, Any]:
        """Return the values of the state for JSON."""
        return {
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "factors": self.factors,
        }

    def load(self, tensors: Mapping[str, Tensor], json_state: Mapping[str, Any]) -> None:
        """Load the results of `tensors` and `json_state`, with the learning rates of the first steps."""
        if json_state.get("factors", self.factors) != self.factors:  # computed from weights that are trained already
            self._begin(dict(json_state["factors"]))
        self.weights.load({name: tensors[f"parameter.{name}"] for name in self.weights.masters})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, number, name = key.split(".", 2)
                state.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.schedule.load_state_dict({**self.schedule.state_dict(), **json_state["schedule"]})
        for group, rate in zip(self.optimizer.param_groups, json_state["rates"], strict=True):
            group["lr"] = rate
