"""Which model statistics are of."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics.profile import Profile

_VALUES_A_PARAMETER = 16


def identity(stack: BlockStack) -> dict[str, Any]:
    """What tells the model of a stack from another, as JSON values.

    Parameters
    ----------
    stack : BlockStack

    Returns
    -------
    dict
        The model's class, the stack's path and number of blocks, and a fingerprint of the parameters: of their names,
        shapes and dtypes, and of up to 16 values of each. It tells a finetuned model, or one in another precision,
        from the original, without reading all weights. Of parameters that are not in memory as plain tensors
        (offloaded, sharded or quantized ones) no value is looked at.

    Examples
    --------
    >>> from streamline_hooks.stack import find_stack
    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    >>> before = identity(find_stack(encoder))
    >>> before["model"], before["stack"], before["blocks"]
    ('TransformerEncoder', 'layers', 3)
    >>> encoder.layers[1].linear1.bias.data += 1
    >>> identity(find_stack(encoder))["fingerprint"] == before["fingerprint"]
    False
    """
    return {
        "model": type(stack.model).__name__,
        "stack": stack.path,
        "blocks": len(stack),
        "fingerprint": fingerprint_of(stack.model),
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


def fingerprint_of(model: nn.Module) -> str:
    """The fingerprint in `identity`."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        plain = parameter.detach()
        if type(plain) is Tensor and not plain.is_meta and plain.layout == torch.strided:
            flat = plain.reshape(-1)
            some = flat[:: max(1, len(flat) // _VALUES_A_PARAMETER)][:_VALUES_A_PARAMETER]
            found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
