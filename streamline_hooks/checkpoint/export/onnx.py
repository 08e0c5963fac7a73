"""Export a compressed model, including splices, to ONNX with a cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamline_hooks.checkpoint.export.plain import check_no_prompt_skip
from streamline_hooks.core import StreamlineError, atomic_file
from streamline_hooks.modeling import inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRACED = (2, 3, 5)  # sequences, cached tokens and new tokens of the traced call


def export_onnx(model: PreTrainedModel, file: str | Path) -> Path:
    """Export the forward pass from token ids to logits, for any batch size and length, with a KV cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal language model, with or without splices.
    file : str or Path
        File to write, with bfloat16 weights as float32. Weights of more than 2 GB are written to a second file next to
        it.

    Returns
    -------
    Path
        The file. Its inputs are ``input_ids`` and, if the model has them, ``position_ids``, int64 of shape (batch,
        tokens); ``attention_mask``, int64 of shape (batch, cached + new tokens); and for each block k
        ``past_key_values.k.key`` and ``.value``, float of shape (batch, key-value heads, cached tokens, head size),
        with 0 cached tokens in the first call. Its outputs are ``logits`` and for each block ``present.k.key`` and
        ``.value``, the inputs of the next call. The names are those of Hugging Face Optimum.

    Raises
    ------
    StreamlineError
        If a required package is missing, or the cache has more than keys and values, such as a recurrent state.

    Examples
    --------
    >>> export_onnx(model, "small.onnx")  # doctest: +SKIP
    PosixPath('small.onnx')
    """
    check_onnx()
    check_no_prompt_skip(model)
    target, device = Path(file), next(model.parameters()).device
    batch, cached, new = _TRACED
    ids = torch.ones(batch, new, dtype=torch.long, device=device)
    with inference(model), _batched_experts(model), _bfloat16_as_float32(model):
        past = _keys_and_values(model(ids[:, :cached], use_cache=True), type(model).__name__)
        inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": ids.new_ones(batch, cached + new)}
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = torch.arange(cached, cached + new, device=device).expand(batch, -1).contiguous()
        dynamic: Any = torch.export.Dim.DYNAMIC
        shapes: dict[str, Any] = {name: {0: dynamic, 1: dynamic} for name in inputs}
        names = [f"{k}.{part}" for k in range(len(past) // 2) for part in ("key", "value")]
        program = torch.onnx.export(
            _WithCache(model).eval(),
            kwargs={"inputs": inputs, "past": past},
            dynamo=True,
            input_names=[*shapes, *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            dynamic_shapes={"inputs": shapes, "past": [{0: dynamic, 2: dynamic}] * len(past)},
            verbose=False,
        )
        assert program is not None
        with atomic_file(target) as temporary_path:
            program.save(temporary_path)
    return target


@contextmanager
def _bfloat16_as_float32(model: nn.Module) -> Iterator[None]:
    """Convert bfloat16 weights, for which ONNX Runtime has no kernels on a CPU, while the context is entered."""
    tensors = [t for t in chain(model.parameters(), model.buffers()) if t.dtype == torch.bfloat16]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


@contextmanager
def _batched_experts(model: PreTrainedModel) -> Iterator[None]:
    """Run the experts of a mixture by an operator that ONNX has."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def check_onnx() -> None:
    """Raise unless the packages for ONNX are installed."""
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise StreamlineError(
            f"Exporting to ONNX needs {' and '.join(missing)}, not installed. Install the extra `onnx`: "
            'pip install "streamline_hooks[onnx]"'
        )


class _WithCache(nn.Module):
    """A model with keys and values as plain inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return logits of shape (batch, tokens, vocabulary), and the keys and values of all tokens by block."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for k in range(0, len(past), 2):
            cache.update(past[k], past[k + 1], k // 2)
        output = self.model(**inputs, past_key_values=cache, use_cache=True)
        return output.logits, _keys_and_values(output, type(self.model).__name__)


def _keys_and_values(output: Any, name: str) -> list[Tensor]:
    """Return keys and values of each block in turn."""
    cache = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or any(not isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise StreamlineError(
            f"The cache of a {name} has other contents than keys and values. Expected a model with attention in each "
            "block. Serve it with Transformers."
        )
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]
