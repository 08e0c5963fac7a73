"""What the rules by name cannot know: arguments of single model types, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """How large a tiny model shall be.

    Attributes
    ----------
    blocks : int
        Number of blocks.
    width : int
        Features of the hidden state, a multiple of 32.
    vocabulary : int
        Number of tokens.
    """

    blocks: int
    width: int
    vocabulary: int

    heads = 4
    positions = 128

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.width // self.heads

    @property
    def intermediate(self) -> int:
        """Features inside an MLP, different from every other size."""
        return self.width * 3 // 2

    def tower(self) -> Size:
        """The size of a vision or audio tower beside the text model."""
        return replace(self, blocks=2)


def _cycle(*kinds: str) -> Callable[[Size], list[str]]:
    """One kind for each block, in turn."""
    return lambda size: [kinds[block % len(kinds)] for block in range(size.blocks)]


def _every(step: int) -> Callable[[Size], list[int]]:
    """Each block that ends a group of so many."""
    return lambda size: list(range(step - 1, size.blocks, step))


def _blocks(size: Size) -> int:
    return size.blocks


# Arguments without which a class does not even make its default configuration.
STARTS: Mapping[str, Mapping[str, Any]] = {
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

# The model type is that of the configuration, nested or not. A function gets the size of the model. A mapping holds
# arguments of a nested configuration. Where a class makes all blocks of one kind by default, but released models mix
# kinds, kinds are mixed here; names of kinds that Transformers 4 has too are its own, which Transformers 5 translates.
PECULIARITIES: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 4},  # as for Jamba
    "bamba": {"attn_layer_indices": _every(3)},
    "big_bird": {"attention_type": "original_full"},  # falls back to it, with a warning, for short texts
    "blt": {
        "global_config": {"num_hidden_layers": _blocks},
        "num_hidden_layers": _blocks,  # the cache asks for it, the class does not have it
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
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}},  # read, though neither is set nor optional
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5,  # an eighth of 8 features is no pair
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
    "gemma4_text": {"global_head_dim": lambda size: 2 * size.head_dim},  # blocks of full attention have wider heads
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
        "attn_layer_period": 4,  # without a block of attention there is no cache
        "attn_layer_offset": 2,
        "use_mamba_kernels": False,  # Transformers 4 insists on them
    },
    "kimi_linear": {"layer_types": _cycle(*["linear_attention"] * 3, "full_attention")},  # as for Jamba
    "lfm2": {"layer_types": _cycle("conv", "conv", "full_attention")},
    "lfm2_moe": {"layer_types": _cycle("conv", "conv", "full_attention")},
    "longcat_flash": {"head_dim": lambda size: size.head_dim // 2},  # the rotated part alone
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
    "musicgen_decoder": {"num_codebooks": 1},  # else a row of tokens for each
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
        "hash_seed": 0,  # else each call hashes differently
    },
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},  # the inner widths are rounded up to multiples of 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 0, "use_mamba_kernels": False},  # two shared blocks at least
    "zamba2": {"layers_block_type": _cycle("mamba", "mamba", "hybrid")},
}
