"""Architectures of llama.cpp for which a plain checkpoint can be written, by model type in Transformers.

An entry says under which name llama.cpp runs an architecture, what its file must contain besides the shared settings,
and which values of a configuration a file cannot express. Names of weights come from the package ``gguf``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import StreamlineError, get_logger

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel

logger = get_logger(__name__)
Weights = Iterator[tuple[str, Tensor]]
_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # llama.cpp computes that with tanh; at most 5e-4 apart
_ROPE_TYPES = ("default", "linear", "llama3")
_READS_WINDOWS = 11063  # the earliest build that was verified; 10809 does not read a list
_WINDOW_BY_LAYER_TYPE = ("qwen2", "qwen3", "smollm3")  # others without a window in llama.cpp ignore layer_types


@dataclass(frozen=True)
class GGUFArchitecture:
    """Settings of a model type for llama.cpp.

    Attributes
    ----------
    name : str
        Name of the architecture in llama.cpp.
    rope : {"halves", "pairs", None}
        Which features of a head llama.cpp rotates together: those half a head apart, or neighbors; None without rotary
        embeddings.
    reorders_heads : bool
        Whether the rows of queries and keys are reordered from halves to pairs.
    norm_offset : float
        Constant that llama.cpp expects to be added to the weights of norms.
    window_period : int, optional
        Period of the blocks in llama.cpp of which all but the last attend to a sliding window, unless the file says
        for each block whether it does; None if llama.cpp does not read that.
    always_has_head : bool
        Whether llama.cpp requires the weight of the LM head even if it is that of the embedding.
    has_partial_rotary : bool
        Whether a part of each head may be rotated.
    has_free_heads : bool
        Whether the heads together may have another size than the hidden state.
    values : mapping of str to tuple
        Values of settings that a file cannot express and llama.cpp presupposes.
    settings : callable
        Adds settings of this architecture to a writer.
    check : callable
        Raises for a configuration that llama.cpp would run differently.
    """

    name: str
    rope: str | None = "halves"
    reorders_heads: bool = False
    norm_offset: float = 0.0
    window_period: int | None = None
    always_has_head: bool = False
    has_partial_rotary: bool = False
    has_free_heads: bool = False
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Callable[[gguf.GGUFWriter, Any], None] | None = None
    check: Callable[[Any], None] | None = None


def check_config(architecture: GGUFArchitecture, config: Any) -> None:
    """Raise if llama.cpp would run a model with this configuration differently, or not at all."""
    for name, accepted in ({"is_causal": (True, None)} | dict(architecture.values)).items():
        if (value := getattr(config, name, accepted[0])) not in accepted:
            raise _unsupported(f"{name}={value!r}", " or ".join(map(repr, accepted)))
    if architecture.window_period is None and (window := _sliding_window(config)) is not None:
        raise _unsupported(
            f"A sliding window of {window} tokens",
            f"none, because llama.cpp lets every block of {architecture.name} attend to all tokens",
        )
    if architecture.rope is not None:
        rope = rope_parameters(config)
        accepted_types = _ROPE_TYPES if architecture.name in ("llama", "arcee") else _ROPE_TYPES[:2]
        if rope["rope_type"] not in accepted_types:
            raise _unsupported(f"Rotary embeddings of type {rope['rope_type']!r}", ", ".join(accepted_types))
        if not architecture.has_partial_rotary and _rotary_share(config) != 1.0:
            raise _unsupported(f"partial_rotary_factor={_rotary_share(config)}", "1.0")
    heads = config.num_attention_heads * head_size(config)
    if not architecture.has_free_heads and heads != config.hidden_size:
        raise _unsupported(f"Heads of {heads} features together", f"{config.hidden_size}, as the hidden state")
    if architecture.check is not None:
        architecture.check(config)


def write_settings(writer: gguf.GGUFWriter, architecture: GGUFArchitecture, config: Any) -> None:
    """Add the settings of a model to a file, except the sizes that may differ between blocks."""
    writer.add_name(str(config.name_or_path).rpartition("/")[2] or "model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(eps)
    else:
        names = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
        writer.add_layer_norm_eps(next((value for name in names if (value := getattr(config, name, None))), 1e-5))
    if architecture.rope is not None:
        _write_rope(writer, rope_parameters(config), rotary_size(config))
    if architecture.window_period is not None:
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
        has_window = [kind == "sliding_attention" for kind in config.layer_types]
        period = architecture.window_period
        if has_window == [k % period < period - 1 for k in range(len(has_window))]:
            writer.add_sliding_window_pattern(period)
        else:
            writer.add_sliding_window_pattern(has_window)
            logger.warning(
                f"llama.cpp before build {_READS_WINDOWS} (September 2026) computes other logits from this file: it "
                f"ignores which blocks attend to a sliding window, and lets {period - 1} of {period} do so. Run it "
                "with a newer build."
            )
        if (local := (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")) is not None:
            writer.add_rope_freq_base_swa(local["rope_theta"])
    if (experts := expert_count(config)) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if (size := getattr(config, "moe_intermediate_size", None)) is not None:
            writer.add_expert_feed_forward_length(size)
    if architecture.settings is not None:
        architecture.settings(writer, config)


def weights_of(model: PreTrainedModel, architecture: GGUFArchitecture) -> Weights:
    """Yield the weights of a model with their names in Transformers, in the layout of llama.cpp."""
    config: Any = model.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding is not None and head is not None and embedding.weight is head.weight
    heads = {"q_proj": config.num_attention_heads, "k_proj": key_heads(config)}
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        module, kind = model.get_submodule(stem), stem.rpartition(".")[2]
        if tied and module is head and not architecture.always_has_head:
            continue
        if kind == "experts" and suffix == "gate_up_proj":
            for part, tensor in zip(("gate_proj", "up_proj"), weight.chunk(2, dim=1), strict=True):
                yield f"{stem}.{part}.weight", tensor
            continue
        if kind == "experts":
            name = f"{name}.weight"
        elif type(module).__name__ == "Conv1D" and suffix == "weight":
            weight = weight.T
        elif kind == "query_key_value":  # by head, then by query, key and value
            by_head = weight.unflatten(0, (config.num_attention_heads, 3, -1))
            weight = by_head.transpose(0, 1).reshape(weight.shape)
        elif kind in heads and architecture.reorders_heads:
            weight = halves_to_pairs(weight, heads[kind])
        elif architecture.norm_offset and _is_norm(module, kind) and suffix == "weight":
            weight = weight + architecture.norm_offset
        yield name, weight
    if architecture.rope is not None and (divisors := _llama3_divisors(config)) is not None:
        yield "rope_freqs.weight", divisors


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head for llama.cpp, which rotates neighboring pairs instead of halves."""
    halves: Tensor = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def head_size(config: Any) -> int:
    """Return the number of features of an attention head."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def key_heads(config: Any) -> int:
    """Return the number of heads of keys and values."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def expert_count(config: Any) -> int | None:
    """Return the number of experts of a mixture, or None."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)


def inner_size(config: Any) -> int:
    """Return the inner width of the MLP."""
    size: int = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return size


def rope_parameters(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of full attention, with ``rope_type`` and ``rope_theta``."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = dict(rope.get("full_attention", rope))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type", "default")
    rope.setdefault("rope_theta", getattr(config, "rope_theta", 10_000.0))
    return rope


def rotary_size(config: Any) -> int:
    """Return the number of features of a head that are rotated."""
    return int(head_size(config) * _rotary_share(config))


def _rotary_share(config: Any) -> float:
    own: float | None = getattr(config, "partial_rotary_factor", None)
    return rope_parameters(config).get("partial_rotary_factor") or own or 1.0


def _write_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any], size: int) -> None:
    import gguf

    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _llama3_divisors(config: Any) -> Tensor | None:
    """Return the divisor of each rotary frequency for rope type llama3, else None."""
    rope, size = rope_parameters(config), head_size(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors: Tensor = (plain / scaled.double()).float()
    return divisors


def _sliding_window(config: Any) -> int | None:
    """Return the tokens of the sliding window of at least one block, if it is shorter than the context."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) if config.model_type in _WINDOW_BY_LAYER_TYPE else None
    used = window is not None and (kinds is None or "sliding_attention" in kinds)
    return window if used and window < config.max_position_embeddings else None


def _is_norm(module: nn.Module, name: str) -> bool:
    return "norm" in f"{name} {type(module).__name__}".lower()


def _unsupported(setting: str, accepted: str) -> StreamlineError:
    return StreamlineError(f"{setting} cannot be exported to GGUF. Expected {accepted}. Export to ONNX.")


def _check_local_rope(config: Any) -> None:
    """Raise if blocks with a sliding window have scaled rotary embeddings, which llama.cpp does not scale."""
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise _unsupported(f"Rotary embeddings of type {local['rope_type']!r} in sliding windows", "default")


def _check_olmo3(config: Any) -> None:
    _check_local_rope(config)
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention") or {}
    base = rope_parameters(config)["rope_theta"]
    if local.get("rope_theta", base) != base:
        raise _unsupported(f"rope_theta={local['rope_theta']} in sliding windows", f"{base}, as in the other blocks")


def _check_cohere(config: Any) -> None:
    if config.num_hidden_layers >= _COHERE_WITH_NORMS:
        raise _unsupported(
            f"num_hidden_layers={config.num_hidden_layers}",
            f"fewer than {_COHERE_WITH_NORMS}, from which on llama.cpp expects norms of queries and keys",
        )


def _check_gemma(large: int) -> Callable[[Any], None]:
    """Return a check for Gemma 2 and 3, whose largest models have `large` blocks.

    llama.cpp takes a model with this number of blocks for the largest one, which scales attention differently.
    """

    def check(config: Any) -> None:
        _check_local_rope(config)
        is_large = config.num_hidden_layers == large
        size = config.hidden_size // config.num_attention_heads if is_large else head_size(config)
        if config.query_pre_attn_scalar != size:
            raise _unsupported(
                f"query_pre_attn_scalar={config.query_pre_attn_scalar} with {config.num_hidden_layers} blocks",
                f"{size}, the value that llama.cpp infers from the number of blocks",
            )

    return check


def _check_positions(config: Any) -> None:
    """Raise unless every fourth block of SmolLM3 has no rotary embedding, as llama.cpp assumes."""
    expected = [int((k + 1) % 4 != 0) for k in range(config.num_hidden_layers)]
    if list(map(int, config.no_rope_layers)) != expected:
        raise _unsupported(
            f"no_rope_layers={list(config.no_rope_layers)}",
            f"{expected}, because llama.cpp omits rotary embeddings in every fourth block. Remove multiples of four "
            "blocks",
        )


def _softcaps(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _check_softcaps(config: Any) -> None:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is None:
            raise _unsupported(f"{name}=None", "a number, because llama.cpp always applies it")
    _check_gemma(46)(config)


def _final_softcap(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _granite_scales(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _clamp(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)


_SILU = {"hidden_act": ("silu",)}
_NO_BIAS = {"attention_bias": (False,)}
_CAUSAL = {"use_bidirectional_attention": (None, False)}
_COHERE_WITH_NORMS = 64
_LLAMA = GGUFArchitecture(
    "llama", "pairs", reorders_heads=True, has_free_heads=True, values=_SILU | _NO_BIAS | {"mlp_bias": (False,)}
)
_COHERE = GGUFArchitecture(
    "command-r",
    "pairs",
    values=_SILU | _NO_BIAS | {"use_qk_norm": (False,), "tie_word_embeddings": (True,)},
    settings=lambda writer, config: writer.add_logit_scale(config.logit_scale),
    check=_check_cohere,
)

ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "arcee": replace(_LLAMA, name="arcee", values=_NO_BIAS | {"hidden_act": ("relu2",), "mlp_bias": (False,)}),
    "granite": replace(_LLAMA, name="granite", settings=_granite_scales),
    "smollm3": replace(_LLAMA, name="smollm3", check=_check_positions),
    "olmo": replace(_LLAMA, name="olmo", has_free_heads=False, values=_SILU | _NO_BIAS, settings=_clamp),
    "olmo2": GGUFArchitecture("olmo2", always_has_head=True, values=_SILU | _NO_BIAS),
    "olmo3": GGUFArchitecture(
        "olmo2", always_has_head=True, window_period=4, values=_SILU | _NO_BIAS, check=_check_olmo3
    ),
    "qwen2": GGUFArchitecture("qwen2", values=_SILU),
    "qwen3": GGUFArchitecture("qwen3", has_free_heads=True, values=_SILU | _NO_BIAS),
    "qwen3_moe": GGUFArchitecture(
        "qwen3moe",
        has_free_heads=True,
        values=_SILU | _NO_BIAS | {"norm_topk_prob": (True,), "mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
    ),
    "seed_oss": GGUFArchitecture(
        "seed_oss", has_free_heads=True, values=_SILU | {"attention_out_bias": (False,), "mlp_bias": (False,)}
    ),
    "gemma": GGUFArchitecture(
        "gemma",
        norm_offset=1.0,
        has_free_heads=True,
        values=_NO_BIAS | _CAUSAL | {"hidden_act": _GELU, "tie_word_embeddings": (True,)},
    ),
    "gemma2": GGUFArchitecture(
        "gemma2",
        norm_offset=1.0,
        window_period=2,
        has_free_heads=True,
        values=_NO_BIAS | _CAUSAL | {"hidden_activation": _GELU, "tie_word_embeddings": (True,)},
        settings=_softcaps,
        check=_check_softcaps,
    ),
    "gemma3_text": GGUFArchitecture(
        "gemma3",
        norm_offset=1.0,
        window_period=6,
        has_free_heads=True,
        values=_NO_BIAS | _CAUSAL | {"hidden_activation": _GELU, "attn_logit_softcapping": (None,)},
        settings=_final_softcap,
        check=_check_gemma(62),
    ),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, name="cohere2", window_period=4, check=None),
    "phi3": GGUFArchitecture("phi3", has_partial_rotary=True, values=_SILU),
    "phi": GGUFArchitecture(
        "phi2",
        always_has_head=True,
        has_partial_rotary=True,
        values={"hidden_act": _GELU, "qk_layernorm": (False,)},
    ),
    "stablelm": GGUFArchitecture(
        "stablelm", always_has_head=True, has_partial_rotary=True, values=_SILU | {"qk_layernorm": (False,)}
    ),
    "starcoder2": GGUFArchitecture("starcoder2", values={"hidden_act": _GELU, "use_bias": (True,)}),
    "gpt2": GGUFArchitecture(
        "gpt2",
        None,
        values={
            "activation_function": _GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "gpt_neox": GGUFArchitecture(
        "gptneox",
        always_has_head=True,
        has_partial_rotary=True,
        values={"hidden_act": _GELU, "attention_bias": (True,)},
        settings=lambda writer, config: writer.add_parallel_residual(config.use_parallel_residual),
    ),
    "nemotron": GGUFArchitecture(
        "nemotron",
        norm_offset=1.0,
        always_has_head=True,
        has_partial_rotary=True,
        values=_NO_BIAS | {"hidden_act": ("relu2",)},
    ),
}
"""Architecture of each model type; others are refused."""
