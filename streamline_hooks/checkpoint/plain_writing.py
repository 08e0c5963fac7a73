"""Write a model that is no Transformers model: its weights, and what was done to it.

Its class is not written in a way that could be run: who loads it builds the original architecture, and
`plain_reading` makes of it what was saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import Tensor, nn

from streamline_hooks.checkpoint.held_tensors import apart, unsaved_buffers, weights_of
from streamline_hooks.checkpoint.safety import PLAIN, WEIGHTS
from streamline_hooks.checkpoint.settings import settings_of, to_json
from streamline_hooks.errors import StreamlineError
from streamline_hooks.surgery.plain_module import PLAIN_FORMAT, described_stacks, history_of


def class_name(model: nn.Module) -> str:
    """The module and the name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def write_plain(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write the weights of a model to a folder, and the file that describes them.

    Parameters
    ----------
    model : torch.nn.Module
        After `LayerSurgeon.commit`.
    folder : Path

    Returns
    -------
    dict
        What was written to the file that describes them.

    Raises
    ------
    StreamlineError
        As `described_stacks`, `weights_of` and `apart` do.
    """
    stacks = described_stacks(model)
    buffers = {name: tensor for name, tensor in unsaved_buffers(model).items() if tensor is not None}
    for name, tensor in buffers.items():
        if tensor.is_meta:
            raise StreamlineError(
                f"{name} of this {type(model).__name__} is on the device meta, and a buffer that is not persistent is "
                "kept nowhere else. Offload without buffers, or save before offloading."
            )
    said = {
        "class": class_name(model),
        "streamline_hooks": {"format": PLAIN_FORMAT, "stacks": stacks, "history": history_of(model)},
        "buffers": list(buffers),
        "settings": to_json(settings_of(model)),
    }
    save_model(_Holder(apart({**weights_of(model), **buffers})), str(folder / WEIGHTS))
    (folder / PLAIN).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return said


class _Holder(nn.Module):
    """Gives safetensors, which asks a module for them, the buffers too that its ``state_dict`` leaves out."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return dict(self._tensors)
