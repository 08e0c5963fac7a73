"""Write a compressed model as ONNX, splices and all: they are traced with their blocks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamline_hooks.core.files import atomic_file
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEEDED = ("onnx", "onnxscript")


def export_onnx(model: PreTrainedModel, file: str | Path) -> Path:
    """Write what maps token numbers to logits, for any batch and any length, without a cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, with or without splices.
    file : str or Path
        Weights of more than 2 GB, and those that torch chooses to, lie beside it.

    Returns
    -------
    Path
        The file. Its inputs are ``input_ids`` and ``attention_mask``, both int64 of shape (batch, tokens), its output
        is ``logits``.

    Raises
    ------
    StreamlineError
        If a package that this needs is missing.
    """
    require_onnx()
    target = Path(file)
    ids = torch.ones(2, 8, dtype=torch.long)
    device = next(model.parameters()).device
    shape: Any = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with inference(model):
        program = torch.onnx.export(
            _Logits(model).eval(),
            (ids.to(device), torch.ones_like(ids).to(device)),
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": shape, "attention_mask": shape},
            verbose=False,
        )
    assert program is not None
    with atomic_file(target) as new:
        program.save(new)
    return target


def require_onnx() -> None:
    """Raise unless the packages that write ONNX are installed.

    Raises
    ------
    StreamlineError
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise StreamlineError(
            f"Writing ONNX needs what is not installed: {' and '.join(missing)}. Install it: pip install "
            f"{' '.join(missing)}"
        )


class _Logits(nn.Module):
    """A model of two tensors to one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of shape (batch, tokens, vocabulary)."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits
