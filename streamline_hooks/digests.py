"""Tell whether two models, two texts, or two lists of batches are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from streamline_hooks.errors import StreamlineError


def weights_digest(model: nn.Module) -> str:
    """Return BLAKE2b, in hexadecimal, of every parameter and buffer: its name, shape, dtype and all of its values.

    Forward hooks, and what a module keeps in plain attributes, are not seen.

    Raises
    ------
    StreamlineError
        If some of the weights are elsewhere ("meta"), as those are that accelerate offloads.
    """
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise StreamlineError(
                f"The weights of {name} are not in memory (device meta), so that it cannot be told whether this is a "
                "model which is known. Load it without offloading, or keep nothing."
            )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Return a digest, in hexadecimal, of a model's weights, see `weights_digest`, and of its configuration.

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


def batches_digest(items: Sequence[Any]) -> str:
    """Return BLAKE2b, in hexadecimal, of every tensor in batches: its name, shape, dtype and values, in their order.

    Parameters
    ----------
    items : sequence
        Batches: tensors, mappings by name, and lists or tuples of such. What is none of these is not seen.

    Examples
    --------
    >>> one, other = torch.tensor([[1, 2]]), torch.tensor([[1], [2]])
    >>> batches_digest([one]) == batches_digest([other])
    False
    """
    digest = hashlib.blake2b(digest_size=8)

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for number, inside in enumerate(value):
                add(f"{name}[{number}]", inside)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
            digest.update(_bytes(value))

    add("", list(items))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    try:
        flat = tensor.detach().cpu().contiguous().view(-1)
        return flat.view(torch.uint8).numpy().data
    except (RuntimeError, TypeError):  # a subclass of a tensor, such as a quantised one, that holds several
        return repr(tensor.detach().cpu()).encode()
