"""Export a compressed Llama to GGUF, the format of llama.cpp.

A model of unchanged architecture becomes a ``llama`` file. A model with zeroed attentions becomes a ``deci`` file. This
architecture of llama.cpp for Nemotron-51B (arXiv 2411.19146) has a separate number of heads per block. A block with 0
heads computes x + MLP(norm x) and has no attention weights. A block with heads but 0 key heads has a linear map of the
normalized state instead of its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from streamline_hooks.checkpoint.export.plain import check_no_splices
from streamline_hooks.core import StreamlineError, atomic_file, parse_json
from streamline_hooks.modeling import find_stack
from streamline_hooks.replacements import NormedLinearReplacement
from streamline_hooks.surgery import AFTER, BEFORE, spliced

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel

Architecture = Literal["llama", "deci"]
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # name in llama.cpp, and whether pieces that are tokens are not merged
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    rf"{_WORDS}|\p{{N}}|{_REST}": ("qwen2", False),
}
_SETTINGS = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False}


def export_gguf(
    model: PreTrainedModel,
    file: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "f32",
    skip_zeroed_attention: bool = True,
) -> Architecture:
    """Export a compressed Llama to one GGUF file, atomically.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        ``LlamaForCausalLM`` without splices, except linear maps of the normalized state that replace attentions
        (`NormedLinearReplacement`).
    file : str or Path
        File to write.
    tokenizer : str or Path, optional
        Folder with ``tokenizer.json``; by default the file has no vocabulary.
    dtype : {"f32", "f16", "bf16"}
        Dtype of the matrices; default ``"f32"``. Vectors are float32.
    skip_zeroed_attention : bool
        Omit zeroed attentions, except that of the first block; default True. With omitted attentions the file is a
        ``deci`` file.

    Returns
    -------
    {"llama", "deci"}
        The architecture of the file.

    Raises
    ------
    StreamlineError
        If the model is of another type, or has other splices, or a setting or tokenizer that GGUF does not support.

    Examples
    --------
    >>> import tempfile
    >>> from streamline_hooks.testing import tiny_model
    >>> export_gguf(tiny_model("llama"), f"{tempfile.mkdtemp()}/small.gguf", dtype="f16")
    'llama'
    """
    import gguf

    config: Any = model.config
    if not hasattr(model, "lm_head") or not hasattr(model, "model"):
        raise StreamlineError(
            f"A {type(model).__name__} has no LM head. Expected a LlamaForCausalLM. Load the model as one."
        )
    check_gguf(config, dtype)
    linear_attentions = _linear_attentions(model)
    if not linear_attentions:
        check_no_splices(model)
    blocks = list(model.model.layers)
    # llama.cpp reads the head size from the first block, which therefore keeps its attention even if it is zeroed.
    is_zeroed = [skip_zeroed_attention and k > 0 and _is_zero(block.self_attn.o_proj) for k, block in enumerate(blocks)]
    has_attention = [k not in linear_attentions and not zeroed for k, zeroed in enumerate(is_zeroed)]
    architecture: Architecture = "llama" if all(has_attention) else "deci"
    with atomic_file(file) as temporary_path:
        writer = gguf.GGUFWriter(temporary_path, architecture)
        _write_settings(writer, config, has_attention, linear_attentions, architecture)
        _write_vocabulary(writer, None if tokenizer is None else Path(tokenizer), config.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(blocks))
        for name, tensor in _tensors(model, has_attention, linear_attentions):
            stem, _, suffix = name.rpartition(".")
            gguf_name = name if name == "rope_freqs.weight" else f"{names.get_name(stem)}.{suffix}"
            _add(writer, gguf_name, tensor, _DTYPES[dtype] if tensor.ndim > 1 else torch.float32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=True)
        writer.close()
    return architecture


def check_gguf(config: Any, dtype: str = "f32") -> None:
    """Raise if a model with this config cannot be exported, as far as this is known without its weights."""
    if find_spec("gguf") is None:
        raise StreamlineError(
            "Exporting to GGUF needs the package gguf, which is not installed. Install the extra `gguf`: pip "
            'install "streamline_hooks[gguf]"'
        )
    architecture = (getattr(config, "architectures", None) or [""])[0].removeprefix("Streamlined")
    model_types = {config.model_type, getattr(config, "base_model_type", "")}
    if "llama" not in model_types or architecture not in ("", "LlamaForCausalLM"):
        raise StreamlineError(
            f"A {architecture or config.model_type} cannot be exported to GGUF here. Expected a LlamaForCausalLM. "
            "Convert a plain checkpoint of another architecture with convert_hf_to_gguf.py of llama.cpp."
        )
    if dtype not in _DTYPES:
        raise StreamlineError(f"dtype={dtype!r} is unknown. Expected one of {', '.join(_DTYPES)}. Choose one.")
    for name, value in _SETTINGS.items():
        if getattr(config, name, value) != value:
            raise StreamlineError(
                f"{name}={getattr(config, name)!r} cannot be exported to GGUF. Expected {value!r}. Export to ONNX."
            )


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


def _write_settings(
    writer: gguf.GGUFWriter,
    config: Any,
    has_attention: list[bool],
    linear_attentions: Mapping[int, nn.Module],
    architecture: Architecture,
) -> None:
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    rope, rope_type, theta, head_size = _rope_parameters(config)
    if rope_type not in ("default", "linear", "llama3"):
        raise StreamlineError(
            f"Rotary embeddings of type {rope_type!r} cannot be exported to GGUF. Expected default, linear or llama3. "
            "Export to ONNX."
        )
    writer.add_name(config.name_or_path.rpartition("/")[2] or "model")
    writer.add_block_count(len(has_attention))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    if rope_type == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "llama":
        writer.add_head_count(heads)
        writer.add_head_count_kv(key_heads)
        writer.add_feed_forward_length(config.intermediate_size)
    else:
        writer.add_head_count(
            [heads if present or k in linear_attentions else 0 for k, present in enumerate(has_attention)]
        )
        writer.add_head_count_kv([key_heads if present else 0 for present in has_attention])
        writer.add_feed_forward_length([config.intermediate_size] * len(has_attention))


def _tensors(
    model: Any, has_attention: list[bool], linear_attentions: Mapping[int, NormedLinearReplacement]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights with their names in Transformers, in the layout of GGUF."""
    config = model.config
    key_heads = config.num_key_value_heads or config.num_attention_heads
    heads = {"q_proj": config.num_attention_heads, "k_proj": key_heads}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if (tied and name == "lm_head.weight") or {BEFORE, AFTER} & set(parts):
            continue
        if parts[1] == "layers" and not has_attention[int(parts[2])] and parts[3] in ("self_attn", "input_layernorm"):
            continue
        if parts[-2] in heads:
            weight = _interleaved(weight, heads[parts[-2]])
        yield name, weight
    for k, module in linear_attentions.items():
        yield f"model.layers.{k}.input_layernorm.weight", module.norm.weight
        yield f"model.layers.{k}.self_attn.o_proj.weight", module.projection.weight
    frequencies = _llama3_frequencies(config)
    if frequencies is not None:
        yield "rope_freqs.weight", frequencies


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head for llama.cpp, which rotates neighboring pairs instead of halves."""
    halves: Tensor = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def _llama3_frequencies(config: Any) -> Tensor | None:
    """Return the divisor of each rotary frequency for rope type llama3, else None."""
    _, kind, theta, size = _rope_parameters(config)
    if kind != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / scaled.double()).float()


def _rope_parameters(config: Any) -> tuple[dict[str, Any], str, float, int]:
    """Return the rotary parameters, their type, their base and the head size."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, theta = rope.get("rope_type") or rope.get("type", "default"), getattr(config, "rope_theta", 10_000.0)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return rope, kind, rope.get("rope_theta", theta), size


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    import gguf

    finite = bool(torch.isfinite(tensor).all())
    tensor = tensor.detach().cpu().to(dtype).contiguous()
    if finite and not torch.isfinite(tensor).all():
        raise StreamlineError(f"{name} contains values outside the range of float16. Choose dtype f32 or bf16.")
    if dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy().view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def _write_vocabulary(writer: gguf.GGUFWriter, folder: Path | None, size: int) -> None:
    """Write the tokenizer; token ids of the model without a token become unused tokens."""
    import gguf

    if folder is None:
        writer.add_tokenizer_model("no_vocab")
        return
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StreamlineError(f"{file} is missing. Save a fast tokenizer there with tokenizer.save_pretrained.")
    tokenizer: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
    if tokenizer["model"].get("type") != "BPE":
        raise StreamlineError(
            f"{file} contains a {tokenizer['model'].get('type')} tokenizer. Expected BPE. Use a tokenizer of Llama."
        )
    if tokenizer["model"].get("byte_fallback"):
        _write_sentencepiece(writer, folder, tokenizer, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pretokenizer(tokenizer, file))
        tokens, types = _tokens(tokenizer, size)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=not tokenizer["model"].get("byte_fallback"), n_vocab=size).add_to_gguf(
        writer, quiet=True
    )


def _write_sentencepiece(writer: gguf.GGUFWriter, folder: Path, tokenizer: dict[str, Any], size: int) -> None:
    """Write a vocabulary with byte fallback, as in Llama 2."""
    import gguf

    rows = list(gguf.LlamaHfVocab(folder).all_tokens())
    if len(rows) > size:
        raise StreamlineError(
            f"The tokenizer has {len(rows)} tokens, the model only {size}. Pass the tokenizer of this model."
        )
    rows += [(f"[PAD{k}]".encode(), -10_000.0, gguf.TokenType.UNUSED) for k in range(len(rows), size)]
    steps = tokenizer.get("normalizer") or {}
    parts = steps.get("normalizers", [steps])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _, _ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([int(token_type) for _, _, token_type in rows])
    writer.add_add_space_prefix(
        any(part.get("type") == "Prepend" for part in parts)
        or (tokenizer.get("pre_tokenizer") or {}).get("prepend_scheme", "never") != "never"
    )


def _pretokenizer(tokenizer: dict[str, Any], file: Path) -> str:
    """Return the name of the pre-tokenizer in llama.cpp."""
    steps = tokenizer.get("pre_tokenizer") or {}
    parts = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [part.get("type") for part in parts]
    merges_all = not tokenizer["model"].get("ignore_merges", False)
    last = parts[-1] if parts[-1].get("type") == "ByteLevel" and not parts[-1].get("add_prefix_space") else {}
    uses_regex = last.get("use_regex", True)
    if last and merges_all and uses_regex and kinds == ["ByteLevel"]:
        return "gpt-2"
    if last and merges_all and uses_regex and kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if last and not uses_regex and kinds == ["Split", "ByteLevel"]:
        name, keeps_tokens = _SPLITS.get(str((parts[0].get("pattern") or {}).get("Regex")), ("", False))
        if name and keeps_tokens != merges_all:
            return name
    raise StreamlineError(
        f"{file}: the pre-tokenizer {', '.join(map(str, kinds))} is unknown. Expected one of Llama, SmolLM2, Qwen2 or "
        "GPT-2. Convert the folder with convert_hf_to_gguf.py of llama.cpp."
    )


def _tokens(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return all tokens by id, and their types."""
    import gguf

    tokens_by_id = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    types_by_id = dict.fromkeys(tokens_by_id, gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        tokens_by_id[added["id"]] = added["content"]
        types_by_id[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if max(tokens_by_id) >= size:
        raise StreamlineError(
            f"The tokenizer has token {max(tokens_by_id)}, the model only {size} tokens. Pass the tokenizer of this "
            "model."
        )
    tokens = [tokens_by_id.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [int(types_by_id.get(number, gguf.TokenType.UNUSED)) for number in range(size)]
