"""Export a model to GGUF, the format of llama.cpp.

A plain model becomes a file of its own architecture, see `gguf_architectures`. A Llama with zeroed attentions becomes a
``deci`` file. This architecture of llama.cpp for Nemotron-51B (arXiv 2411.19146) has a separate number of heads per
block. A block with 0 heads computes x + MLP(norm x) and has no attention weights. A block with heads but 0 key heads
has a linear map of the normalized state instead of its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from streamline_hooks.checkpoint.export.gguf_architectures import (
    ARCHITECTURES,
    GGUFArchitecture,
    check_config,
    inner_size,
    key_heads,
    weights_of,
    write_settings,
)
from streamline_hooks.checkpoint.export.gguf_vocabulary import write_vocabulary
from streamline_hooks.checkpoint.export.plain import check_no_prompt_skip, check_no_splices
from streamline_hooks.core import StreamlineError, atomic_file
from streamline_hooks.modeling import find_stack
from streamline_hooks.replacements import NormedLinearReplacement
from streamline_hooks.surgery import AFTER, BEFORE, spliced

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel

GGUFDtype = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
"""Types of the matrices in a GGUF file."""
_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_QUANTIZED = ("q8_0", "q4_0")  # blocks of 32 weights with a scale
_BLOCK = 32
_FINE = ("token_embd", "output.")  # matrices with 8 bits also in 4-bit files
_PRECISE = ("ffn_gate_inp", "position_embd")  # routers, whose best experts may be close, and positions
_WITHOUT_ATTENTION = {"llama": "deci"}  # architectures of llama.cpp with a number of heads per block, by model type


def export_gguf(
    model: PreTrainedModel,
    file: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: GGUFDtype = "f32",
    skip_zeroed_attention: bool = True,
) -> str:
    """Export a plain model to one GGUF file, atomically.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal language model without splices. In a ``LlamaForCausalLM``, linear maps of the normalized state may
        replace attentions (`NormedLinearReplacement`).
    file : str or Path
        File to write.
    tokenizer : str or Path, optional
        Folder with ``tokenizer.json``; by default the file has no vocabulary.
    dtype : {"f32", "f16", "bf16", "q8_0", "q4_0"}
        Type of the matrices; default ``"f32"``. Vectors, routers of experts and learned positions are float32.
        ``"q8_0"`` and ``"q4_0"`` are 8 and 4 bits per weight and a scale for each 32 weights of a row, rounded to
        nearest; with ``"q4_0"`` embeddings and LM head have 8 bits. Rows of other lengths than a multiple of 32 are
        float16.
    skip_zeroed_attention : bool
        Omit zeroed attentions of a Llama, except that of the first block; default True. With omitted attentions the
        file is a ``deci`` file.

    Returns
    -------
    str
        The architecture of the file.

    Raises
    ------
    StreamlineError
        If the architecture is unknown, or the model has splices, or a setting or tokenizer that GGUF does not support.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks.testing import tiny_model
    >>> export_gguf(tiny_model("qwen2"), f"{tempfile.mkdtemp()}/small.gguf", dtype="f16")
    'qwen2'
    """
    import gguf

    config: Any = model.config
    check_gguf(config, dtype)
    check_no_prompt_skip(model)
    if model.get_output_embeddings() is None:
        raise StreamlineError(
            f"A {type(model).__name__} has no LM head. Expected a causal language model. Load it with "
            "AutoModelForCausalLM."
        )
    model_type = type(config).model_type
    architecture, without_attention = ARCHITECTURES[model_type], _WITHOUT_ATTENTION.get(model_type)
    linear_attentions = _linear_attentions(model) if without_attention is not None else {}
    if not linear_attentions:
        check_no_splices(model)
    blocks: list[Any] = list(find_stack(model).blocks)
    # llama.cpp reads the head size from the first block, which therefore keeps its attention even if it is zeroed.
    omits = skip_zeroed_attention and without_attention is not None
    is_zeroed = [omits and k > 0 and _is_zero(block.self_attn.o_proj) for k, block in enumerate(blocks)]
    has_attention = [k not in linear_attentions and not zeroed for k, zeroed in enumerate(is_zeroed)]
    name = architecture.name if all(has_attention) else str(without_attention)
    with atomic_file(file) as temporary_path:
        writer = gguf.GGUFWriter(temporary_path, name)
        write_settings(writer, architecture, config)
        _write_sizes(writer, config, has_attention, linear_attentions)
        write_vocabulary(writer, None if tokenizer is None else Path(tokenizer), config.vocab_size, _end_tokens(model))
        known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(known[architecture.name], len(blocks))
        for own_name, tensor in _tensors(model, architecture, has_attention, linear_attentions):
            gguf_name = _gguf_name(names, own_name)
            _add(writer, gguf_name, tensor, _dtype_of(gguf_name, tensor, dtype))
        if dtype in _QUANTIZED:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=True)
        writer.close()
    return name


def check_gguf(config: Any, dtype: str = "f32") -> None:
    """Raise if a model with this config cannot be exported, as far as this is known without its weights."""
    if find_spec("gguf") is None:
        raise StreamlineError(
            "Exporting to GGUF needs the package gguf, which is not installed. Install the extra `gguf`: pip "
            'install "streamline_hooks[gguf]"'
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = type(config).model_type  # with splices, that of the original
    model_class = (getattr(config, "architectures", None) or [""])[0].removeprefix("Streamlined")
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if model_type not in ARCHITECTURES or model_class not in ("", expected):
        raise StreamlineError(
            f"A {model_class or expected or model_type} cannot be exported to GGUF here. Expected a causal language "
            f"model of type {', '.join(ARCHITECTURES)}. If llama.cpp supports the architecture, export a plain "
            "checkpoint and convert it with llama.cpp: python convert_hf_to_gguf.py FOLDER"
        )
    if dtype not in get_args(GGUFDtype):
        raise StreamlineError(
            f"dtype={dtype!r} is unknown. Expected one of {', '.join(get_args(GGUFDtype))}. Choose one."
        )
    check_config(ARCHITECTURES[model_type], config)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the tokens at which generation with Transformers stops."""
    ids = [getattr(config, "eos_token_id", None) for config in (model.generation_config, model.config)]
    ends: Any = next((value for value in ids if value is not None), [])
    return [ends] if isinstance(ends, int) else list(ends)


def _is_zero(projection: nn.Module) -> bool:
    """Whether all parameters of an output projection are zero."""
    return not any(bool(parameter.any()) for parameter in projection.parameters())


def _linear_attentions(model: PreTrainedModel) -> dict[int, NormedLinearReplacement]:
    """Return the linear maps that replace attentions, by block; empty if the model has any other splice."""
    stack = find_stack(model)
    linear_attentions: dict[int, NormedLinearReplacement] = {}
    for k, block in enumerate(stack.blocks):
        modules = [*spliced(block, BEFORE), *spliced(block, AFTER)]
        if not modules:
            continue
        module, projection = modules[0], getattr(getattr(block, "self_attn", None), "o_proj", None)
        fits = len(modules) == 1 and isinstance(module, NormedLinearReplacement) and spliced(block, BEFORE)
        if not fits or projection is None or not _is_zero(projection):
            return {}
        assert isinstance(module, NormedLinearReplacement)
        if k == 0 or module.norm.eps != getattr(model.config, "rms_norm_eps", None):
            raise StreamlineError(
                f"Cannot export the linear map that replaces the attention of block {k}: "
                + (
                    "llama.cpp reads the head size from the first block. Keep its attention."
                    if k == 0
                    else f"its norm has eps={module.norm.eps}, but a GGUF file has one eps for all norms."
                )
            )
        linear_attentions[k] = module
    return linear_attentions


def _write_sizes(
    writer: gguf.GGUFWriter, config: Any, has_attention: list[bool], linear_attentions: Mapping[int, nn.Module]
) -> None:
    """Add the numbers of heads and the inner width, for each block if blocks differ."""
    heads, groups, inner = config.num_attention_heads, key_heads(config), inner_size(config)
    if all(has_attention):
        writer.add_head_count(heads)
        writer.add_head_count_kv(groups)
        writer.add_feed_forward_length(inner)
        return
    writer.add_head_count([heads if p or k in linear_attentions else 0 for k, p in enumerate(has_attention)])
    writer.add_head_count_kv([groups if present else 0 for present in has_attention])
    writer.add_feed_forward_length([inner] * len(has_attention))


def _tensors(
    model: PreTrainedModel,
    architecture: GGUFArchitecture,
    has_attention: list[bool],
    linear_attentions: Mapping[int, NormedLinearReplacement],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights with their names in Transformers, without those of omitted attentions."""
    path = f"{find_stack(model).path}."
    for name, weight in weights_of(model, architecture):
        inside = name.removeprefix(path).split(".") if name.startswith(path) else []
        if {BEFORE, AFTER} & set(inside):
            continue
        if inside and not has_attention[int(inside[0])] and inside[1] in ("self_attn", "input_layernorm"):
            continue
        yield name, weight
    for k, module in linear_attentions.items():
        yield f"{path}{k}.input_layernorm.weight", module.norm.weight
        yield f"{path}{k}.self_attn.o_proj.weight", module.projection.weight


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    """Return the name of a weight in a file."""
    if name == "rope_freqs.weight":
        return name
    stem, _, suffix = name.rpartition(".")
    if (known := names.get_name(stem)) is None:
        raise StreamlineError(
            f"The weight {name} has no name in GGUF. Expected the weights of the original architecture. Export to ONNX."
        )
    return f"{known}.{suffix}"


def _dtype_of(name: str, tensor: Tensor, dtype: str) -> str:
    """Return the type with which a weight is stored."""
    if tensor.ndim == 1 or any(part in name for part in _PRECISE):
        return "f32"
    if dtype not in _QUANTIZED:
        return dtype
    if tensor.shape[-1] % _BLOCK:
        return "f16"
    return "q8_0" if name.startswith(_FINE) else dtype


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, dtype: str) -> None:
    import gguf

    finite = bool(torch.isfinite(tensor).all())
    tensor = tensor.detach().cpu().to(_DTYPES.get(dtype, torch.float32)).contiguous()
    if finite and not torch.isfinite(tensor).all():
        raise StreamlineError(f"{name} contains values outside the range of float16. Choose dtype f32 or bf16.")
    if dtype in _QUANTIZED:
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    elif dtype == "bf16":
        raw = tensor.view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())
