"""Open a checkpoint's folder as a model whose blocks stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamline_hooks.checkpoint import load
from streamline_hooks.checkpoint.safety import check_folder
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery.spliced_model import MODEL_TYPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_checkpoint(
    folder: str | Path, *, dtype: torch.dtype | None = None, offload_folder: str | Path | None = None
) -> PreTrainedModel:
    """Open a causal language model without reading its blocks.

    The embeddings, the norms and whatever else is not a block are in memory. The blocks, and an LM head that shares no
    weight with the embeddings, are on the meta device; accelerate reads them straight from the safetensors files when
    they run, and `resident` keeps a block there for as long as it is needed.

    Parameters
    ----------
    folder : str or Path
        A Transformers checkpoint in safetensors, in one file or in several.
    dtype : torch.dtype, optional
        Of the weights; by default that of the checkpoint.
    offload_folder : str or Path, optional
        Where Transformers writes the weights that it keeps otherwise in a checkpoint than in a model, as those of most
        mixtures of experts. It has to stay as long as the model does, and takes as much room as they do.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode, to be run on the CPU.

    Raises
    ------
    StreamlineError
        If the folder holds no whole checkpoint of such a model, as for `load`; the text names the file and the key.
    UnsupportedSurgery
        If the checkpoint is of a kind that cannot be run block by block.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks.testing import tiny_model
    >>> folder = tempfile.mkdtemp()
    >>> tiny_model("llama").save_pretrained(folder)
    >>> model = open_checkpoint(folder)
    >>> model.model.embed_tokens.weight.device.type, model.model.layers[3].mlp.up_proj.weight.device.type
    ('cpu', 'meta')
    """
    where = Path(folder)
    stack = _skeleton(where)
    precision = "auto" if dtype is None else dtype
    try:
        model = load(where, device_map=_device_map(stack), dtype=precision, offload_folder=offload_folder)
    except ValueError as error:
        if offload_folder is not None or "offload_folder" not in str(error):
            raise
        raise UnsupportedSurgery(
            f"{where} keeps weights of a {type(stack.model).__name__} otherwise than the model does, so that they "
            "cannot be read straight from its files. Name a folder with room for them: offload_folder=."
        ) from error
    if type(model) is not type(stack.model):
        raise UnsupportedSurgery(
            f"{where} holds a {type(model).__name__}; expected a {type(stack.model).__name__}, the causal language "
            "model of its configuration, to be run block by block. Load it into memory."
        )
    elsewhere = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if elsewhere:
        raise UnsupportedSurgery(
            f"The buffer {elsewhere[0]} of {type(model).__name__} is not in memory after loading, and would not be "
            "read with its block. Load the model into memory."
        )
    return model


def _skeleton(folder: Path) -> BlockStack:
    """The stack of the model that a folder's configuration describes, without any weight."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    said = check_folder(folder)
    if said.get("model_type") == MODEL_TYPE:
        raise UnsupportedSurgery(
            f"{folder} holds a model with spliced modules, which is not run block by block. Open the original's "
            "checkpoint, or load this one into memory with streamline_hooks.load."
        )
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedSurgery(
            f"{folder} holds a {config.model_type}, an encoder and a decoder, whose blocks need what the encoder made. "
            "Only a decoder is run block by block; load this one into memory."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedSurgery(
            f"{folder} holds quantized weights, which are not read block by block. Open the checkpoint in float32, "
            "float16 or bfloat16."
        )
    try:
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise StreamlineError(
            f"{folder} holds a {config.model_type}, which Transformers knows no causal language model of. Open the "
            "checkpoint of one."
        ) from error
    model.tie_weights()
    return find_stack(model)


def _device_map(stack: BlockStack) -> dict[str, str]:
    """Every block and an LM head of its own on disk, all else in memory."""
    on_disk = {f"{stack.path}.{name}" for name, _ in stack.container.named_children()}
    head = _own_head(stack.model)
    placed: dict[str, str] = {}
    names = ["", *_parents(stack.path)]
    for name, module in zip(names, stack.ancestors, strict=True):
        prefix = f"{name}." if name else ""
        for child, inside in module.named_children():
            path = prefix + child
            if inside is head:
                placed[path] = "disk"
            elif path not in names and path != stack.path:
                placed[path] = "cpu"
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        placed |= {prefix + tensor: "cpu" for tensor, _ in own}
    return placed | dict.fromkeys(sorted(on_disk), "disk")


def _parents(path: str) -> list[str]:
    """``a.b.c`` lies below ``a`` and ``a.b``."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _own_head(model: Any) -> nn.Module | None:
    """The LM head, if it has no weight of another module; a block-by-block pass never runs it."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None
    held = {id(parameter) for parameter in head.parameters()}
    uses = sum(id(parameter) in held for _, parameter in model.named_parameters(remove_duplicate=False))
    return head if uses == len(held) else None
