"""Tiny random models of six families, made once a process."""

from __future__ import annotations

import copy
import functools
from random import Random

import torch
import transformers
from torch import nn

from streamline_hooks import LayerSurgeon
from streamline_hooks.replacements import LinearReplacement

WIDTH, BLOCKS, VOCABULARY = 32, 6, 61

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
_MIXED = ["sliding_attention", "full_attention"] * 3

SETTINGS = {
    "llama": ("LlamaConfig", _GROUPED),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 128}),
    "gpt2": ("GPT2Config", {**_COMMON, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 128}),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {**_GROUPED, "head_dim": 8, "layer_types": _MIXED, "sliding_window": 4, "query_pre_attn_scalar": 8},
    ),
}
FAMILIES = tuple(SETTINGS)


def tiny_config(family: str, **changes: object) -> transformers.PretrainedConfig:
    name, settings = SETTINGS[family]
    return getattr(transformers, name)(**{**copy.deepcopy(settings), **changes})


@functools.cache
def _original(family: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family)).eval()
        for parameter in model.parameters():  # far from the identity, so that a wrong block shows
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy, which the caller may do anything to."""
    return copy.deepcopy(_original(family)).to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def left_padded(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The first sequence whole, each further one shorter by two."""
    ids, mask = tokens(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        pad = min(2 * row, length - 1)
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def padded(lengths: list[int], side: str) -> dict[str, torch.Tensor]:
    """Sequences of these lengths, padded on a side."""
    width, source = max(lengths), tokens(len(lengths), max(lengths))
    ids, mask = torch.zeros_like(source), torch.zeros_like(source)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = source[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


def shuffled_batches(batch: dict[str, torch.Tensor], size: int, random: Random) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch in any order, a few at a time."""
    order = list(range(len(batch["input_ids"])))
    random.shuffle(order)
    return [{k: v[order[at : at + size]] for k, v in batch.items()} for at in range(0, len(order), size)]


class Nudge(nn.Module):
    """A replacement that leaves a trace."""

    def __init__(self, features: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.2 * torch.randn(features, features, generator=generator))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + state @ self.weight


def repaired(family: str, window: range = range(1, 3), dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(family, dtype)
    with LayerSurgeon(model) as surgeon:
        generator = torch.Generator().manual_seed(5)
        surgeon.replace(window, LinearReplacement.from_map(0.1 * torch.randn(WIDTH, WIDTH, generator=generator)))
        surgeon.commit()
    return model
