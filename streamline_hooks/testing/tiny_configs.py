"""Shrink configurations by rules for the names of attributes, and exceptions by model type."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """Size of a tiny model: number of blocks, width (features, a multiple of 32) and vocabulary."""

    blocks: int
    width: int
    vocabulary: int

    heads = 4
    positions = 128

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads

    @property
    def intermediate(self) -> int:
        """Width of the MLP's hidden layer, different from all other sizes."""
        return self.width * 3 // 2

    def tower(self) -> Size:
        """Return the size of a vision or audio tower."""
        return replace(self, blocks=2)


def _cycle(*kinds: str) -> Callable[[Size], list[str]]:
    """Return a rule that assigns the kinds to the blocks in turn."""
    return lambda size: [kinds[block % len(kinds)] for block in range(size.blocks)]


def _every(step: int) -> Callable[[Size], list[int]]:
    """Return a rule that selects the last block of each group of `step` blocks."""
    return lambda size: list(range(step - 1, size.blocks, step))


def _blocks(size: Size) -> int:
    return size.blocks


# Arguments that a configuration class requires for its default configuration.
REQUIRED_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "musicgen": {  # Transformers 4
        "text_encoder": {"model_type": "t5"},
        "audio_encoder": {"model_type": "encodec"},
        "decoder": {"model_type": "musicgen_decoder"},
    },
    "musicgen_melody": {
        "text_encoder": {"model_type": "t5"},
        "audio_encoder": {"model_type": "encodec"},
        "decoder": {"model_type": "musicgen_melody_decoder"},
    },
    "phi4_multimodal": {"audio_config": {}, "vision_config": {}},
}

# Arguments by model type, also of nested configurations. A function receives the size of the model. A mapping contains
# arguments of a nested configuration. If released models mix kinds of blocks, but the default configuration does not,
# the kinds are mixed here. Kinds are named as in Transformers 4 where it has them; Transformers 5 translates them.
CONFIG_RULES: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 4},  # as for Jamba
    "bamba": {"attn_layer_indices": _every(3)},
    "big_bird": {"attention_type": "original_full"},  # the class falls back to it with a warning for short texts
    "blt": {
        "global_config": {"num_hidden_layers": _blocks},
        "num_hidden_layers": _blocks,  # the cache reads it, but the class does not define it
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere": {"logit_scale": 1.0},  # the logits are multiplied by it
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": _cycle("sliding_attention", "full_attention"),
        "rope_parameters": lambda size: {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}},  # read, but neither set by default nor optional
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5,  # the default of an eighth of 8 features is less than a pair
    },
    "dory": {"n_input_layers": lambda size: size.blocks // 4, "n_output_layers": lambda size: size.blocks // 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": lambda size: size.heads,
        "swa_num_key_value_heads": lambda size: size.heads,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": lambda size: 2 * size.head_dim,
        "swa_qk_nope_head_dim": lambda size: size.head_dim,
        "swa_v_head_dim": lambda size: size.head_dim,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": _cycle("dense", "sparse")},
    "falcon_h1": {"mamba_d_ssm": lambda size: 2 * size.width},
    "gemma3n_audio": {"vocab_size": 8, "vocab_offset": lambda size: size.vocabulary + 8},
    "gemma3n_text": {"num_kv_shared_layers": lambda size: size.blocks // 4 if size.blocks > 5 else 0},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": _blocks,
        }
    },
    "gemma4_text": {"global_head_dim": lambda size: 2 * size.head_dim},  # full-attention blocks have wider heads
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": _blocks}},
    "gemma4_unified_text": {"global_head_dim": lambda size: 2 * size.head_dim},
    "gpt_neo": {"attention_types": lambda size: [[_cycle("global", "local")(size), 1]]},
    "granitemoehybrid": {"layer_types": _cycle("mamba", "mamba", "attention")},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": lambda size: 2 * (size.blocks // 2) - 2,
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},  # the logits are divided by it
    "jamba": {
        "attn_layer_period": 4,  # without an attention block there is no cache
        "attn_layer_offset": 2,
        "use_mamba_kernels": False,  # Transformers 4 requires them by default
    },
    "kimi_linear": {"layer_types": _cycle(*["linear_attention"] * 3, "full_attention")},  # as for Jamba
    "lfm2": {"layer_types": _cycle("conv", "conv", "full_attention")},
    "lfm2_moe": {"layer_types": _cycle("conv", "conv", "full_attention")},
    "longcat_flash": {"head_dim": lambda size: size.head_dim // 2},  # only the rotated part
    "mamba2": {"head_dim": lambda size: 2 * size.width // size.heads},  # heads of the doubled width
    "mega": {"bidirectional": False},
    "minimax_m3_vl_text": {
        "layer_types": _cycle("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": _cycle("dense", "sparse"),
    },
    "mllama_text_model": {
        "cross_attention_layers": _every(4),
        "rope_scaling": {"rope_type": "default"},
    },
    "musicgen_decoder": {"num_codebooks": 1},  # otherwise each codebook needs a row of tokens
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h": {"layers_block_type": _cycle("linear_attention", "moe", "full_attention", "mlp")},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": lambda size: size.head_dim,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "attn_layers": _cycle("local", "lsh"),
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": lambda size: (size.width // 4, size.width * 3 // 4),
        "num_buckets": 4,
        "hash_seed": 0,  # otherwise each call hashes differently
    },
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},  # the inner widths are rounded up to multiples of 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 0, "use_mamba_kernels": False},  # at least two shared blocks
    "zamba2": {"layers_block_type": _cycle("mamba", "mamba", "hybrid")},
}


_SMALL = 16  # a smaller vocabulary is a table of types, which is not changed


# The first pattern that matches the whole name applies. A rule is an attribute of the size, an upper limit, or a
# function of the default value (a positive int) and the size.
_RULES: tuple[tuple[str, str | int | Callable[[int, Size], int]], ...] = (
    # Numbers of blocks, of all kinds and of one kind
    (
        r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|num_blocks|depth|\w+_num_hidden_layers"
        r"|num_global_layers",
        "blocks",
    ),
    (r"max_window_layers", lambda value, size: min(value, size.blocks // 2)),
    (r"first_k_dense_replace|num_dense_layers", 1),
    # Embedding tables
    (r"(\w+_)?vocab_size(_\w+)?", lambda value, size: value if value < _SMALL else size.vocabulary),
    (
        r"max_position_embeddings|original_max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length"
        r"|max_(source|target)_positions|max_positions|max_sequence_length",
        "positions",
    ),
    (r"codebook_size", 64),
    (r"num_position_embeddings|rel_extent", 16),
    (r"\w*num_buckets", 8),
    # Experts
    (r"(num_|n_|moe_num_|num_local_|n_routed_|num_routed_)experts|zero_expert_num", 4),
    (r"(moe_)?num_shared_experts|n_shared_experts", 1),
    (r"num_experts_per_tok(en)?|(moe_)?top_?k|moe_k|top_k_experts", 2),
    (r"n_groups?|\w+_n_?groups|num_expert_group|o_groups", 2),
    (r"topk_group", 1),
    # Heads
    (r"(\w+_)?(num_key_value_heads|n_kv_heads|kv_n_heads|num_kv_heads)", 2),
    (r"(\w+_)?(heads|n_head)(_\w+)?", "heads"),
    (r"rotary_dim|qk_rope_head_dim", lambda value, size: size.head_dim // 2),
    (
        r"(\w+_)?head_?(dim|size)|d_head|d_kv|dim_head|kv_channels|query_pre_attn_scalar|hidden_size_per_layer_input",
        "head_dim",
    ),
    # Ranks, states, windows and chunks
    (r"\w+_(rank|lowrank)|\w*state_size|\w+_d_state", 8),
    (r"(\w+_)?chunk_(size|length)|block_size|\w+_attn_chunk_length|index_topk", 8),
    (r"(\w+_)?(sliding_)?window(_size|_len)?|local_attention|index_block_size", 6),
    (r"prompt_length|prompt_types|segment_types", 4),
    # Widths; the most general pattern is last
    (
        r"(\w+_)?intermediate_size|intermediate_size_mlp|(\w+_)?ffn_dim|(\w+_)?ffn_hidden_size|d_ff|d_inner|dff|dim_ff"
        r"|feed_forward_size|mlp_dim|prompt_mid_dim",
        "intermediate",
    ),
    (
        r"(\w+_)?hidden_size(_\w+)?|d_model|n_embd|(\w+_)?emb(ed)?_dim|(\w+_)?embedding_size|d_embed|input_size"
        r"|(adapter|projector|vision)_(in|out|input|output)_(dim|size)|dim_model_base|\w+_out_channel|\w+_conv_channels|output_channels",
        "width",
    ),
    # Vision and audio towers
    (r"image_size|crop_size", 32),
    (r"patch_size", 16),
)
_COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in _RULES)
_NOISE = re.compile(r"\w*(drop|jitter)\w*|mask_\w+_prob")
_TOKEN = re.compile(r"(\w+_)?token_(id|index)|eo\w_token_\w+|(pad|unk|bos|eos|mask)_index")
_TOKENS = re.compile(r"\w*suppress_tokens|(\w+_)?token_ids?")


class SpecialTokens:
    """Assign different ids within the vocabulary to the special tokens."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._assigned = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}

    def fit(self, name: str, value: int) -> int:
        """Return the default id if it is in the vocabulary, otherwise the next unused id from the end."""
        if value < self._vocabulary:
            return value
        return self._assigned.setdefault(name, self._vocabulary + 3 - len(self._assigned))


def declared_arguments(cls: type) -> dict[str, Any]:
    """Return the arguments of a configuration class with their defaults, None for an argument without a default."""
    if dataclasses.is_dataclass(cls):  # Transformers 5
        return {field.name: _field_default(field) for field in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            arguments[name] = None if parameter.default is parameter.empty else parameter.default
    return arguments


def _field_default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def shrink_value(name: str, value: Any, size: Size, tokens: SpecialTokens) -> Any:
    """Return the tiny value of a config attribute by the rule for its name; other values are unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        return value
    if isinstance(value, list | tuple):
        if _TOKENS.fullmatch(name) and all(isinstance(item, int) for item in value):
            kept = [item for item in value if item < size.vocabulary]
            return kept or [tokens.fit(name, value[0])] if value else value
        return value
    if _NOISE.fullmatch(name):
        return type(value)()
    if isinstance(value, float) or value <= 0:
        return value
    if _TOKEN.fullmatch(name):
        return tokens.fit(name, value)
    rule = next((rule for pattern, rule in _COMPILED if pattern.fullmatch(name)), value)
    if isinstance(rule, str):
        return getattr(size, rule)
    return rule(value, size) if callable(rule) else min(value, rule)


def shrink_config(default: Any, size: Size, tokens: SpecialTokens, overrides: Mapping[str, Any]) -> Any:
    """Return a tiny configuration of the class of `default`.

    Constructor arguments are shrunk, not attributes, so that the class derives the rest (layer types, inner sizes).
    `overrides` are used unchanged; a mapping changes arguments of a nested configuration.
    """
    config = type(default)(**_small_arguments(default, size, tokens, overrides, main=True))
    for part in (config, *filter(_is_config, vars(config).values())):
        _fit_rotary_sections(part)
    return config


def _small_arguments(
    default: Any, size: Size, tokens: SpecialTokens, overrides: Mapping[str, Any], main: bool
) -> dict[str, Any]:
    """Return constructor arguments; `main` if the configuration is, or contains, that of the language model."""
    rules = {name: _resolve(value, size) for name, value in CONFIG_RULES.get(default.model_type, {}).items()}
    chosen = {**rules, **overrides}
    arguments = dict(chosen)
    declared = declared_arguments(type(default))
    text = default.get_text_config(decoder=True)
    for name in [*declared, *(name for name in vars(default) if name not in declared)]:
        value = vars(default).get(name)
        if _is_config(value):
            is_main = value is text or not hasattr(value, "num_hidden_layers")
            nested = {**_mapping(rules.get(name)), **_mapping(overrides.get(name))}
            small = _small_arguments(value, size if is_main else size.tower(), tokens, nested, main and value is text)
            # A dictionary, because some classes of Transformers 4 accept nothing else.
            arguments[name] = {"model_type": value.model_type, **small} if value.model_type else small
        elif name in chosen:
            continue
        elif declared.get(name) is not None:
            # A value of a type other than the declared was derived: 160 from "auto", a list from a single value.
            original = value if type(value) is type(declared[name]) else declared[name]
            arguments[name] = shrink_value(name, original, size, tokens)
        elif name == "head_dim" and "qk_rope_head_dim" not in declared:  # None, which some models do not resolve
            arguments[name] = size.head_dim
    if main and default is text and "is_decoder" in vars(default):
        arguments["is_decoder"] = chosen.get("is_decoder", True)  # BERT's derivatives are bidirectional by default
    if "kv_lora_rank" in declared and "num_key_value_heads" in declared:  # latent attention does not group heads
        arguments["num_key_value_heads"] = chosen.get("num_key_value_heads", arguments["num_attention_heads"])
    return arguments


def _fit_rotary_sections(config: Any) -> None:
    """Set the sections of a multimodal rotary embedding, whose sum is half of the rotated dimensions."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("mrope_section"):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half, parts = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2, len(rope["mrope_section"])
        rope["mrope_section"] = [half // parts + (part < half % parts) for part in range(parts)]


def _resolve(value: Any, size: Size) -> Any:
    if isinstance(value, Mapping):
        return {name: _resolve(item, size) for name, item in value.items()}
    return value(size) if callable(value) else value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_config(value: Any) -> bool:
    return hasattr(value, "get_text_config")
