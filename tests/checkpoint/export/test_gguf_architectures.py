"""Each architecture of the table is written as llama.cpp and Transformers read it, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.checkpoint import export_gguf
from streamline_hooks.testing import tiny_model
from tests.checkpoint.export.test_gguf import linear_attention

NAMES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "arcee": "arcee",
    "granite": "granite",
    "smollm3": "smollm3",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "seed_oss": "seed_oss",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "phi3": "phi3",
    "phi": "phi2",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "nemotron": "nemotron",
}
READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "stablelm", "nemotron")
"""Others need settings that the reader of Transformers drops, such as the size of heads; llama.cpp reads all."""


SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "olmo": {"clip_qkv": 0.5},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "gpt_neox": {"use_parallel_residual": False},
    "stablelm": {"use_parallel_residual": True},
}
"""Settings that differ from the defaults, so that a setting that is missing in the file shows."""


def original(model_type: str, **settings: Any) -> Any:
    """Return a random model whose settings a file can express, far from its initial values."""
    config = copy.deepcopy(tiny_model(model_type).config)
    config.eos_token_id = 2
    for name, value in (SETTINGS.get(model_type, {}) | settings).items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


def cut(model: Any, *removed: int) -> Any:
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(list(removed))
        surgeon.commit()
    return model


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("model_type", NAMES)
def test_no_weight_is_lost(model_type: str, tmp_path: Path) -> None:
    model = cut(original(model_type), 0, 1, 2, 3)  # SmolLM3 can only lose multiples of four
    assert export_gguf(model, tmp_path / "model.gguf") == NAMES[model_type]
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    twice = embedding.numel() if embedding is head and "output.weight" in tensors else 0
    assert sum(tensor.n_elements for tensor in tensors.values()) == twice + sum(p.numel() for p in model.parameters())
    fields, name = fields_of(tmp_path / "model.gguf"), NAMES[model_type]
    assert fields[f"{name}.block_count"] == model.config.num_hidden_layers
    assert {int(n.split(".")[1]) for n in tensors if n.startswith("blk.")} == set(range(model.config.num_hidden_layers))


@pytest.mark.parametrize("model_type", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(model_type: str, tmp_path: Path) -> None:
    model = cut(original(model_type), 1)
    export_gguf(model, tmp_path / "model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [4, 4096])
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "cohere2", "olmo3"])
def test_sliding_windows_are_written_for_each_remaining_block(
    model_type: str, window: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for windows longer than the context: Cohere 2 has rotary embeddings in blocks with a window only."""
    caplog.set_level("WARNING", logger="streamline_hooks")
    model = original(model_type, sliding_window=window)
    kinds = list(model.config.layer_types)
    model = cut(model, 0)
    export_gguf(model, tmp_path / "model.gguf")
    fields, name = fields_of(tmp_path / "model.gguf"), NAMES[model_type]
    assert fields[f"{name}.attention.sliding_window_pattern"] == [kind == "sliding_attention" for kind in kinds[1:]]
    assert fields[f"{name}.attention.sliding_window"] == window
    assert "before build 11063" in caplog.text


@pytest.mark.parametrize(("model_type", "period"), [("gemma2", 2), ("gemma3_text", 6), ("cohere2", 4), ("olmo3", 4)])
def test_the_period_of_sliding_windows_is_written_if_it_holds(
    model_type: str, period: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Builds of llama.cpp that ignore a list read a number."""
    caplog.set_level("WARNING", logger="streamline_hooks")
    model = original(model_type, sliding_window=4)
    export_gguf(model, tmp_path / "model.gguf")
    assert fields_of(tmp_path / "model.gguf")[f"{NAMES[model_type]}.attention.sliding_window_pattern"] == period
    assert caplog.text == ""
    last = len(model.config.layer_types) - 1
    export_gguf(cut(model, last), tmp_path / "shorter.gguf")
    assert fields_of(tmp_path / "shorter.gguf")[f"{NAMES[model_type]}.attention.sliding_window_pattern"] == period


def changed(model_type: str, **settings: Any) -> nn.Module:
    """Return a model whose configuration was changed afterwards, since not every setting builds a tiny model."""
    model: nn.Module = original(model_type)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def test_a_linear_attention_is_only_for_llama(tmp_path: Path) -> None:
    model = original("qwen3")
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(1, "attention")
        surgeon.insert(1, linear_attention(model, seed=1))
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"no plain form.*NormedLinearReplacement"):
        export_gguf(model, tmp_path / "model.gguf")


def local_rope(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    return {"full_attention": rope, "sliding_attention": rope | changes}


def gemma(config_class: str, blocks: int, head_size: int) -> nn.Module:
    """Return a Gemma whose heads have another size than the width divided by their number."""
    config = getattr(transformers, config_class)(
        vocab_size=61, hidden_size=32, intermediate_size=16, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_size, query_pre_attn_scalar=head_size,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: changed("mistral", sliding_window=6), r"sliding window of 6 tokens.*llama\.cpp"),
        (lambda: changed("mixtral", sliding_window=6), r"sliding window of 6 tokens"),
        (lambda: changed("starcoder2", sliding_window=6), r"sliding window of 6 tokens"),
        (lambda: changed("qwen3_moe", norm_topk_prob=False), r"norm_topk_prob=False.*Expected True"),
        (lambda: changed("qwen2", hidden_act="gelu"), r"hidden_act='gelu'.*Expected 'silu'"),
        (lambda: changed("gemma2", attn_logit_softcapping=None), r"attn_logit_softcapping=None.*always"),
        (lambda: changed("cohere", use_qk_norm=True), r"use_qk_norm=True.*Expected False"),
        (lambda: changed("gpt2", scale_attn_by_inverse_layer_idx=True), r"inverse_layer_idx=True.*Expected False"),
        (lambda: changed("phi3", rope_parameters={"rope_type": "yarn"}), r"type 'yarn'.*Expected default, linear"),
        (
            lambda: changed("mistral", sliding_window=6, layer_types=["full_attention"] * 8),
            r"sliding window of 6 tokens",
        ),
        (lambda: changed("qwen2", partial_rotary_factor=0.5), r"partial_rotary_factor=0\.5.*Expected 1\.0"),
        (lambda: changed("qwen2", head_dim=16), r"Heads of \d+ features together.*Expected 32"),
        (lambda: changed("gemma2", use_bidirectional_attention=True), r"use_bidirectional_attention=True"),
        (lambda: changed("llama", is_causal=False), r"is_causal=False.*Expected True"),
        (lambda: changed("cohere", num_hidden_layers=64), r"num_hidden_layers=64.*fewer than 64"),
        (lambda: changed("olmo3", rope_parameters=local_rope(rope_theta=5.0)), r"rope_theta=5\.0 in sliding windows"),
        (lambda: changed("olmo3", rope_parameters=local_rope(rope_type="linear")), r"'linear' in sliding windows"),
        (lambda: changed("gemma3_text", rope_parameters=local_rope(rope_type="linear")), r"'linear' in sliding"),
        (lambda: cut(original("smollm3"), 2), r"no_rope_layers.*multiples of four"),
        (lambda: gemma("Gemma2Config", 46, 8), r"query_pre_attn_scalar=8 with 46 blocks.*Expected 16"),
        (lambda: gemma("Gemma3TextConfig", 62, 8), r"query_pre_attn_scalar=8 with 62 blocks.*Expected 16"),
        (lambda: tiny_model("opt"), r"OPTForCausalLM.*convert_hf_to_gguf\.py FOLDER"),
    ],
)
def test_what_llama_cpp_would_run_differently_is_refused(make: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=reason):
        export_gguf(make(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [45, 47])
def test_other_numbers_of_blocks_keep_the_size_of_the_heads(blocks: int, tmp_path: Path) -> None:
    assert export_gguf(gemma("Gemma2Config", blocks, 8), tmp_path / "model.gguf") == "gemma2"
