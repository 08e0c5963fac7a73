"""Export a compressed model, including splices, to ONNX."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamline_hooks.checkpoint.export.plain import check_no_prompt_skip
from streamline_hooks.core import StreamlineError, atomic_file
from streamline_hooks.modeling import inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_onnx(model: PreTrainedModel, file: str | Path) -> Path:
    """Export the forward pass from token ids to logits, for any batch size and length, without a KV cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal language model, with or without splices.
    file : str or Path
        File to write. Weights of more than 2 GB are written to a second file next to it.

    Returns
    -------
    Path
        The file. Its inputs are ``input_ids`` and ``attention_mask``, int64 of shape (batch, tokens); its output is
        ``logits``.

    Raises
    ------
    StreamlineError
        If a required package is missing.

    Examples
    --------
    >>> export_onnx(model, "small.onnx")  # doctest: +SKIP
    PosixPath('small.onnx')
    """
    check_onnx()
    check_no_prompt_skip(model)
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
    with atomic_file(target) as temporary_path:
        program.save(temporary_path)
    return target


def check_onnx() -> None:
    """Raise unless the packages for ONNX are installed."""
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise StreamlineError(
            f"Exporting to ONNX needs {' and '.join(missing)}, not installed. Install the extra `onnx`: "
            'pip install "streamline_hooks[onnx]"'
        )


class _Logits(nn.Module):
    """Wrapper that returns only the logits of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits of shape (batch, tokens, vocabulary)."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits
