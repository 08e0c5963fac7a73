"""Checkpoint file of a training run: safetensors, written atomically."""

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

from streamline_hooks.core import Batch, HardwareConfig, StreamlineError, atomic_file, batches_digest, parse_json
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.student import Student
from streamline_hooks.repair import FoldedMap, ScaleFactor

_METADATA_KEY = "streamline_hooks_training"
_DIGEST = "blake2b"
_FORMAT = 8
_WITHOUT_DIGEST = 7  # the same content without a digest


def write_training_file(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors and JSON values to a file atomically."""
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary_path:
        text = json.dumps({**values, "format": _FORMAT})
        save_file(cpu_tensors, temporary_path, metadata={_METADATA_KEY: text, _DIGEST: _digest(text, cpu_tensors)})


def read_training_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and JSON values; files of format 7 have no digest."""
    if not path.is_file():
        raise StreamlineError(f"{path} does not exist, so there is no training run to resume. Start without --resume.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata[_METADATA_KEY]
            values = dict(parse_json(text))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StreamlineError(
            f"{path} is not a checkpoint file of a training run, or is damaged ({error or type(error).__name__}). Pass "
            "the right file, or delete it and start again."
        ) from error
    if (format_number := values.get("format", 1)) not in (_WITHOUT_DIGEST, _FORMAT):
        raise StreamlineError(
            f"{path} was written by another version of this library: it has format {format_number}. Expected format "
            f"{_WITHOUT_DIGEST} or {_FORMAT}. Resume with the version that wrote it, or delete it and start again."
        )
    if format_number == _FORMAT and metadata.get(_DIGEST) != _digest(text, tensors):
        raise StreamlineError(
            f"{path} is damaged: its content does not match its digest. Copy it again, or delete it and start again."
        )
    return tensors, values


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of the JSON text and all tensors."""
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


def training_fingerprint(
    config: DistillationConfig,
    hardware: HardwareConfig,
    student: Student,
    parameters: Mapping[str, Tensor],
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
) -> str:
    """Return a fingerprint of everything that determines a training run, except the trainable weights."""
    settings = {name: _text(value) for name, value in _settings(config, hardware).items()}
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    parts = [part for modules in student.modules.values() for module in modules for part in module.modules()]
    module_options = [
        (type(p).__name__, p.extra_repr(), getattr(p, "scaling", None)) for p in parts
    ]  # dropout, LoRA's scale
    task = str(student.task)
    data_digests = batches_digest(batches), batches_digest(validation)
    inside_blocks = [
        [f"{float(value):.3e}" for value in (module.map.norm(), module.map.diagonal().sum())]
        if isinstance(module, FoldedMap)
        else f"{module.factor:.3e}"
        for _, module in student.replacement_modules
        if isinstance(module, (FoldedMap, ScaleFactor))
    ]  # four digits, because another machine may round a fit differently
    if inside_blocks:
        module_options.append(("inside blocks", repr(inside_blocks), None))
    if config.scale_parameter and any(
        student.learning_rate_factor(name, True) != student.learning_rate_factor(name) for name in parameters
    ):  # files without scaled rates stay valid
        module_options.append(("scale_parameter", "all matrices", None))
    parts_of_run = sorted(settings.items()), shapes, student.windows, student.rate, module_options, task, data_digests
    digest = hashlib.sha256(repr((*parts_of_run, *student.settings)).encode())
    for model in dict.fromkeys([student.model, student.teacher]):
        for name, parameter in model.named_parameters():
            digest.update(name.encode())
            if not parameter.is_meta:  # a sample identifies the model; every rank gathers shards
                values = getattr(parameter.detach(), "full_tensor", parameter.detach)().flatten()[:_SAMPLE].clone()
                digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_run(
    config: DistillationConfig,
    hardware: HardwareConfig,
    student: Student,
    batches: Sequence[Batch | Tensor],
    validation: Sequence[Batch | Tensor],
) -> dict[str, str]:
    """Return by name what a message can say about a training run that is not resumed with other arguments."""
    values = {**config.to_dict(), "autocast": hardware.autocast_dtype, "state_dtype": hardware.kept_dtype}
    values |= {"windows": [[window.start, window.stop] for window in student.windows]}
    values |= {"calibration data": batches_digest(batches), "validation data": batches_digest(validation)}
    return {name: _text(value) for name, value in values.items() if name not in _RESUMABLE}


_RESUMABLE = ("max_minutes", "checkpoint_minutes")
_SAMPLE = 64  # values per parameter in the fingerprint
_FIRST_LOSSES = ("kl", "lm", "mse", "relative", "cosine", "embedding", "reverse_kl")


def _settings(config: DistillationConfig, hardware: HardwareConfig) -> dict[str, Any]:
    """Return the settings that determine a run, by their names in the first files of this format.

    The names are part of the fingerprint, so changing a name would invalidate existing files. Time limits, memory and
    callbacks are not included because a run may be resumed with other values.
    """
    # Include the first losses of the format always, and later ones only if they are used.
    weights = {name: config.loss.get(name, 0.0) for name in _FIRST_LOSSES} | dict(config.loss)
    return {
        "objective": weights,
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


def _text(value: Any) -> str:
    """Format a setting such that 1 and 1.0 are equal."""
    if isinstance(value, dict):
        return str({name: _text(entry) for name, entry in value.items()})
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
