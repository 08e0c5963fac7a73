"""What a training is resumed from: one file without pickles, which is always whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamline_hooks.errors import StreamlineError

_KEY = "streamline_hooks_training"


def write_state(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Write tensors and JSON values to one file, which takes the place of an earlier one at the end.

    Raises
    ------
    StreamlineError
        If the file cannot be written; an earlier one is as it was.
    """
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, beside, metadata={_KEY: json.dumps(said)})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise StreamlineError(
            f"The training cannot be kept in {path}: {error}. Make room, or name another file; what was there before "
            "is untouched."
        ) from error


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_state` wrote.

    Raises
    ------
    StreamlineError
        If there is no such file, or it is not one of a training.
    """
    if not path.is_file():
        raise StreamlineError(f"There is no training to resume at {path}; leave --resume out to begin one.")
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})[_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, said  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise StreamlineError(
            f"{path} is not the file of a training, or is damaged ({error or type(error).__name__}). Name the right "
            "one, or delete it and begin again."
        ) from error


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser, each tensor by the number of its parameter and its name."""
    state = optimiser.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser of the same parameters its state again."""
    held = optimiser.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({**held, "state": state})
