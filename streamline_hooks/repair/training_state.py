"""What a training is resumed from: one file without pickles, which is always whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.core.files import atomic_file
from streamline_hooks.core.hardware_config import HardwareConfig
from streamline_hooks.digests import batches_digest
from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.student import Student

_KEY = "streamline_hooks_training"
_DIGEST = "blake2b"
_FORMAT = 8  # what is said in it; another version of this library may say other things
_WITHOUT_DIGEST = 7  # says the same


def write_state(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Write tensors and JSON values to one file atomically."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as new:
        text = json.dumps({**said, "format": _FORMAT})
        save_file(whole, new, metadata={_KEY: text, _DIGEST: _digest(text, whole)})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the file of `write_state`; files of format 7 have no digest."""
    if not path.is_file():
        raise StreamlineError(f"There is no training to resume at {path}; leave --resume out to begin one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata[_KEY]
            said = dict(parse_json(text))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StreamlineError(
            f"{path} is not the file of a training, or is damaged ({error or type(error).__name__}). Name the right "
            "one, or delete it and begin again."
        ) from error
    if (found := said.get("format", 1)) not in (_WITHOUT_DIGEST, _FORMAT):
        raise StreamlineError(
            f"{path} was kept by another version of this library: it has format {found}, and this one reads "
            f"{_WITHOUT_DIGEST} and {_FORMAT}. Go on with the version that kept it, or delete it and begin again."
        )
    if found == _FORMAT and metadata.get(_DIGEST) != _digest(text, tensors):
        raise StreamlineError(
            f"{path} is damaged: its content does not match its digest. Delete it and begin again, or copy it again."
        )
    return tensors, said


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of everything that is kept."""
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the random states of the CPU and of the training device."""
    state = {"random": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore random states."""
    torch.set_rng_state(state["random"])
    if "random.cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["random.cuda"], device)


def fingerprint(
    config: DistillationConfig,
    hardware: HardwareConfig,
    student: Student,
    parameters: Mapping[str, Tensor],
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
) -> str:
    """Return a fingerprint of all that determines a training run except the trainable weights."""
    said = {name: _said(value) for name, value in _settings(config, hardware).items()}
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    parts = [part for modules in student.modules.values() for module in modules for part in module.modules()]
    made = [(type(p).__name__, p.extra_repr(), getattr(p, "scaling", None)) for p in parts]  # dropout, LoRA's scale
    task = str(student.task)
    texts = batches_digest(batches), batches_digest(validation)
    told = sorted(said.items()), shapes, student.windows, student.rate, made, task, texts
    digest = hashlib.sha256(repr(told).encode())
    for model in [student.model] if student.teacher is student.model else [student.model, student.teacher]:
        for name, parameter in model.named_parameters():  # a sample tells one model from another
            digest.update(name.encode() + (b"" if parameter.is_meta else _bytes(_sample(parameter))))
    return digest.hexdigest()


_FIRST_LOSSES = ("kl", "lm", "mse", "relative", "cosine", "embedding", "reverse_kl")


def _settings(config: DistillationConfig, hardware: HardwareConfig) -> dict[str, Any]:
    """Return the settings that a run depends on, by the names they had in the first training files of this format.

    The names are part of the fingerprint: changing one here makes existing files useless. Time limits, memory and
    callbacks are left out, since a run may be resumed with other ones.
    """
    return {
        "objective": _weights(config.loss),
        "on_policy": None,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "betas": config.betas,
        "warmup": config.warmup_ratio,
        "floor": config.min_lr_ratio,
        "clip": config.max_grad_norm,
        "epochs": config.epochs,
        "accumulation": config.gradient_accumulation_steps,
        "autocast": hardware.autocast_dtype,
        "validations": config.validations,
        "patience": config.patience,
        "seed": config.seed or 0,
        "state_dtype": hardware.kept_dtype,
    }


def _weights(loss: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of the losses that were there from the first, and of all others in use."""
    return {name: loss.get(name, 0.0) for name in _FIRST_LOSSES} | dict(loss)


def _said(value: Any) -> str:
    """Format a setting; 1 and 1.0 are the same."""
    if isinstance(value, dict):
        return str({name: _said(one) for name, one in value.items()})
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


_SAMPLE = 64  # values of each parameter


def _sample(parameter: Tensor) -> Tensor:
    """Return a copy of the first values of a parameter; sharded ones are gathered, by all ranks."""
    values = parameter.detach()
    gather = getattr(values, "full_tensor", None)
    return (values if gather is None else gather()).flatten()[:_SAMPLE].clone()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
