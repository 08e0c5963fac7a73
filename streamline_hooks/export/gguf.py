"""Write a compressed Llama as GGUF, the format of llama.cpp.

A model of its architecture as it was becomes a ``llama`` file. One in which attentions are silent becomes a ``deci``
file: that architecture of llama.cpp, made for Nemotron-51B (arXiv 2411.19146), tells the heads block by block, and a
block of no heads is x + MLP(norm x). It has neither keys nor values, nor their weights in the file. A block with heads
of which none is for keys has a linear map of the normalised state in the place of its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from streamline_hooks.core.files import atomic_file
from streamline_hooks.errors import StreamlineError
from streamline_hooks.export.plain import require_plain
from streamline_hooks.export.vocabulary import write_vocabulary
from streamline_hooks.replacements import NormedLinearReplacement
from streamline_hooks.stack import find_stack
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel

Architecture = Literal["llama", "deci"]
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_SETTINGS = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False}


def export_gguf(
    model: PreTrainedModel,
    file: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "f32",
    without_silent: bool = True,
) -> Architecture:
    """Write a plain Llama, with what it was compressed to, as one GGUF file.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A ``LlamaForCausalLM`` without splices, but for linear maps of the normalised state in the place of attentions
        (`fit_branch_linear` with ``normed=True``).
    file : str or Path
        Written whole or not at all.
    tokenizer : str or Path, optional
        A folder with ``tokenizer.json``; without one the file has no vocabulary, and takes and gives token numbers.
    dtype : {"f32", "f16", "bf16"}
        Of the matrices; vectors are float32.
    without_silent : bool
        Leave silent attentions out, but that of the first block, which makes a ``deci`` file if there is one.

    Returns
    -------
    {"llama", "deci"}
        The architecture that was written.

    Raises
    ------
    StreamlineError
        If the model is of another type or has splices, if it has a setting that no such file can hold, or if the
        tokenizer is of a kind that is not known here.
    """
    import gguf

    config: Any = model.config
    if not hasattr(model, "lm_head") or not hasattr(model, "model"):
        raise StreamlineError(f"A {type(model).__name__} has no LM head; a GGUF file is written of a LlamaForCausalLM.")
    require_gguf(config, dtype)
    linear = _linear_attentions(model)
    if not linear:
        require_plain(model)
    blocks = list(model.model.layers)
    # llama.cpp takes the size of a head from the first block, which therefore keeps its attention, silent as it is.
    silent = [without_silent and k > 0 and is_silent(block.self_attn.o_proj) for k, block in enumerate(blocks)]
    own = [k not in linear and not gone for k, gone in enumerate(silent)]
    architecture: Architecture = "llama" if all(own) else "deci"
    with atomic_file(file) as new:
        writer = gguf.GGUFWriter(new, architecture)
        _write_settings(writer, config, own, linear, architecture)
        write_vocabulary(writer, None if tokenizer is None else Path(tokenizer), config.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(blocks))
        for name, tensor in _tensors(model, own, linear):
            stem, _, kind = name.rpartition(".")
            written = name if name == "rope_freqs.weight" else f"{names.get_name(stem)}.{kind}"
            _add(writer, written, tensor, _DTYPES[dtype] if tensor.ndim > 1 else torch.float32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=True)
        writer.close()
    return architecture


def require_gguf(config: Any, dtype: str = "f32") -> None:
    """Raise unless a model of this configuration can be written, as far as that is known without its weights.

    Raises
    ------
    StreamlineError
    """
    if find_spec("gguf") is None:
        raise StreamlineError(
            "Writing GGUF needs the package gguf, which is not installed. Install the extra gguf: "
            "pip install 'streamline-hooks[gguf]'"
        )
    architecture = (getattr(config, "architectures", None) or [""])[0].removeprefix("Streamlined")
    said = {config.model_type, getattr(config, "base_model_type", "")}
    if "llama" not in said or architecture not in ("", "LlamaForCausalLM"):
        raise StreamlineError(
            f"A {architecture or config.model_type} is not written as GGUF here, only a LlamaForCausalLM. A plain "
            "checkpoint of another architecture is read by llama.cpp's own convert_hf_to_gguf.py."
        )
    if dtype not in _DTYPES:
        raise StreamlineError(f"dtype={dtype!r} is unknown; expected one of {', '.join(_DTYPES)}.")
    for name, value in _SETTINGS.items():
        if getattr(config, name, value) != value:
            raise StreamlineError(f"{name}={getattr(config, name)!r} cannot be written here; expected {value!r}.")


def is_silent(projection: nn.Module) -> bool:
    """Whether a branch adds nothing: all weights of its output projection are zero."""
    return not any(bool(parameter.any()) for parameter in projection.parameters())


def _linear_attentions(model: PreTrainedModel) -> dict[int, NormedLinearReplacement]:
    """By block, the maps that stand in the place of attentions; none where anything else is spliced in too."""
    stack = find_stack(model)
    found: dict[int, NormedLinearReplacement] = {}
    for k, block in enumerate(stack.blocks):
        modules = [*spliced(block, BEFORE), *spliced(block, AFTER)]
        if not modules:
            continue
        module, projection = modules[0], getattr(getattr(block, "self_attn", None), "o_proj", None)
        fits = len(modules) == 1 and isinstance(module, NormedLinearReplacement) and spliced(block, BEFORE)
        if not fits or projection is None or not is_silent(projection):
            return {}
        assert isinstance(module, NormedLinearReplacement)
        if k == 0 or module.norm.eps != getattr(model.config, "rms_norm_eps", None):
            raise StreamlineError(
                f"The linear map in the place of the attention of block {k} cannot be written: "
                + (
                    "llama.cpp takes the size of a head from the first block. Keep its attention."
                    if k == 0
                    else f"its norm has eps={module.norm.eps}, and a file has one for all."
                )
            )
        found[k] = module
    return found


def _write_settings(
    writer: gguf.GGUFWriter, config: Any, own: list[bool], linear: Mapping[int, nn.Module], architecture: Architecture
) -> None:
    heads, shared = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise StreamlineError(
            f"Rotary positions of the type {kind!r} cannot be written here; expected default, linear or llama3."
        )
    writer.add_name(config.name_or_path.rpartition("/")[2] or "model")
    writer.add_block_count(len(own))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("rope_theta", getattr(config, "rope_theta", 10_000.0)))
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "llama":
        writer.add_head_count(heads)
        writer.add_head_count_kv(shared)
        writer.add_feed_forward_length(config.intermediate_size)
    else:
        writer.add_head_count([heads if there or k in linear else 0 for k, there in enumerate(own)])
        writer.add_head_count_kv([shared if there else 0 for there in own])
        writer.add_feed_forward_length([config.intermediate_size] * len(own))


def _tensors(
    model: Any, own: list[bool], linear: Mapping[int, NormedLinearReplacement]
) -> Iterator[tuple[str, Tensor]]:
    """The weights that are written, by their name in Transformers, as they are to lie in the file."""
    config = model.config
    shared = config.num_key_value_heads or config.num_attention_heads
    heads = {"q_proj": config.num_attention_heads, "k_proj": shared}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if tied and name == "lm_head.weight":
            continue
        if {BEFORE, AFTER} & set(parts):
            continue
        if parts[1] == "layers" and not own[int(parts[2])] and parts[3] in ("self_attn", "input_layernorm"):
            continue
        if parts[-2] in heads:
            weight = _interleaved(weight, heads[parts[-2]])
        yield name, weight
    for k, module in linear.items():
        yield f"model.layers.{k}.input_layernorm.weight", module.norm.weight
        yield f"model.layers.{k}.self_attn.o_proj.weight", module.projection.weight
    frequencies = _llama3_frequencies(config)
    if frequencies is not None:
        yield "rope_freqs.weight", frequencies


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Each head's rows in the order in which llama.cpp turns them: in pairs, and not in halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _llama3_frequencies(config: Any) -> Tensor | None:
    """By what llama.cpp divides each rotary frequency of a Llama 3.1 and later; None for others."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = rope.get("rope_theta", getattr(config, "rope_theta", 10_000.0))
    plain = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / scaled.double()).float()


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    import gguf

    finite = bool(torch.isfinite(tensor).all())
    tensor = tensor.detach().cpu().to(dtype).contiguous()
    if finite and not torch.isfinite(tensor).all():
        raise StreamlineError(f"{name} holds values that half precision cannot; write f32 or bf16.")
    if dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())
