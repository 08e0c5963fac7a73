"""Identify the model that statistics belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.digests import structure_digest, tensor_bytes
from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics.profile import Profile

_VALUES_A_PARAMETER = 16
_NO_STATES = ("use_cache", "return_dict", "output_hidden_states", "output_attentions")  # settings that change none


def identity(stack: BlockStack, tensors: Iterable[tuple[str, Any]] | None = None) -> dict[str, Any]:
    """Return JSON values that identify a stack's model: class, path, number of blocks, and a fingerprint.

    The fingerprint covers names, shapes, dtypes and up to 16 values of each weight, the modules and the configuration
    (`structure_digest`). It tells a finetuned, cast or spliced model from the original without reading all weights.
    Values of offloaded, sharded or quantized weights are not read. `tensors` replaces the weights by name.
    """
    return {
        "model": type(stack.model).__name__,
        "stack": stack.path,
        "blocks": len(stack),
        "fingerprint": _fingerprint(stack.model, held_weights(stack.model) if tensors is None else tensors),
    }


def check_profile(profile: Profile, model: nn.Module, stack: str | None = None) -> None:
    """Raise unless a profile is of a model.

    Parameters
    ----------
    profile : Profile
        For instance one that was loaded.
    model : torch.nn.Module
    stack : str, optional
        Path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        The text says what differs.
    """
    differ = [
        f"{name} is {value} of the model and {profile.about.get(name, 'unknown')} of the profile"
        for name, value in identity(find_stack(model, stack)).items()
        if value != profile.about.get(name)
    ]
    if differ:
        raise StreamlineError(f"The profile is of another model: {'; '.join(differ)}. Profile this one.")


def held_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters, and the buffers that a checkpoint holds, by name."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


def _fingerprint(model: nn.Module, tensors: Iterable[tuple[str, Any]]) -> str:
    found = hashlib.sha256(structure_digest(model, but=_NO_STATES).encode())
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        plain = tensor.detach()
        if type(plain) is Tensor and not plain.is_meta and plain.layout == torch.strided:
            flat = plain.reshape(-1)
            some = flat[:: max(1, len(flat) // _VALUES_A_PARAMETER)][:_VALUES_A_PARAMETER]
            found.update(tensor_bytes(some))
    return found.hexdigest()[:16]
