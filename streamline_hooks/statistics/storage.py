"""Write and read tensors and JSON values in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamline_hooks.core.files import atomic_file
from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import parse_json

_KEY = "streamline_hooks"


def write_file(
    path: str | Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, sync: bool = True
) -> Path:
    """Write tensors and JSON values to one safetensors file atomically, see `atomic_file` for `sync`."""
    with atomic_file(path, sync=sync) as new:
        save_file({k: v.contiguous() for k, v in tensors.items()}, new, {_KEY: json.dumps(values)})
    return Path(path)


def read_file(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and values that `write_file` wrote; `what` names the expected content in errors."""
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except OSError as error:
        raise StreamlineError(f"{path} cannot be read: {error}. Give a file that holds {what}.") from error
    except SafetensorError as error:
        raise StreamlineError(
            f"{path} is no whole safetensors file ({error}). It may be truncated; give a file that holds {what}."
        ) from error
    try:
        values = parse_json(text or "")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise StreamlineError(f"{path} is a safetensors file of another kind; give one that holds {what}.")
    return tensors, values
