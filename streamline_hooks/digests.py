"""Tell whether two models, or two texts, are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_VALUES_PER_PARAMETER = 16


def weights_digest(model: nn.Module) -> str:
    """Return SHA-256, in hexadecimal, of every parameter's name, shape, dtype and a few of its values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if not parameter.is_meta and parameter.numel():
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _VALUES_PER_PARAMETER)]
            digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Return SHA-256, in hexadecimal, of a model's weights, see `weights_digest`, and of its configuration.

    Where it was loaded from, and by which version of Transformers, makes no difference.
    """
    config: Any = getattr(model, "config", None)
    said: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    for incidental in ("_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype"):
        said.pop(incidental, None)
    return texts_digest([weights_digest(model), json.dumps(said, sort_keys=True, default=str)])


def texts_digest(texts: Iterable[str]) -> str:
    """Return SHA-256, in hexadecimal, of texts in their order.

    Examples
    --------
    >>> texts_digest(["ab", "c"]) == texts_digest(["a", "bc"])
    False
    """
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8))
        digest.update(encoded)
    return digest.hexdigest()
