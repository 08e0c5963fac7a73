"""Checkpoints in several files, and what is read of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn

from benchmarks.small_opt import train_tokenizer
from streamline_hooks import HiddenStateRecorder, find_stack
from streamline_hooks.checkpoint import BlockwiseSource
from streamline_hooks.core import prepare_inputs
from tests.tiny_models import left_padded, padded, tiny_config, tiny_model, tokens

FAMILIES = ["llama", "gpt2", "qwen3", "gemma3"]
DTYPES = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
"""One for each family."""


def written(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Path, Any]:
    """A checkpoint in several shards, and the model that was saved."""
    model: Any = tiny_model(family, dtype)
    model.save_pretrained(folder / family, max_shard_size="50KB")
    assert len(list((folder / family).glob("*.safetensors"))) > 2
    return folder / family, model


def calibration() -> list[dict[str, Tensor] | Tensor]:
    return [left_padded(3, 11), tokens(2, 9, seed=1), padded([7, 3], "right"), left_padded(1, 20, seed=2)]


def places(model: nn.Module, batches: list[Any]) -> list[list[Tensor]]:
    """The states at each place, batch by batch, of a model in memory."""
    found = []
    for batch in batches:
        with torch.no_grad(), HiddenStateRecorder(model) as record:
            model(**prepare_inputs(model, batch))
        last = record.blocks[-1]
        found.append([*(record.inputs[k][0] for k in record.blocks), record.outputs[last][0]])
    return found


def on_disk(model: nn.Module) -> list[bool]:
    """Of each block, whether nothing of it is in memory."""
    return [all(p.is_meta for p in block.parameters()) for block in find_stack(model).blocks]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight was read since the test began."""
    counted: Counter[str] = Counter()
    original = OffloadedWeightsLoader.__getitem__

    def counting(self: Any, key: str) -> Any:
        counted[key] += 1
        return original(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
    return counted


def blockwise(function: Callable[..., Any], model: nn.Module, *args: Any, **options: Any) -> Any:
    """Call a function with a source that loads one block at a time; the source takes its own options."""
    own = {name: options.pop(name) for name in ("memory", "disk", "folder", "check") if name in options}
    with BlockwiseSource(model, **own) as source:
        return function(source, *args, **options)


AMOUNTS: dict[str, Any] = {
    "remove": 2,
    "protect": (-1,),
    "shortlist": 3,
    "sequence_length": 16,
    "calibration_tokens": 256,
    "validation_tokens": 64,
    "test_tokens": 64,
    "batch_size": 8,
}


@functools.cache
def reader() -> tuple[Any, list[str]]:
    """A tokenizer of 300 tokens, and documents of words that follow one another by chance."""
    words = ["the", "a", "cat", "dog", "house", "runs", "sleeps", "green", "small", "and", "under", "over", "near"]
    chance = Random(0)
    texts = [" ".join(chance.choices(words, k=40)) for _ in range(60)]
    return train_tokenizer(texts, 300), texts


def compressible(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A checkpoint in several shards, whose model knows the tokens of `reader`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=300, **changes)).to(dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / family, max_shard_size="40KB")
    assert len(list((folder / family).glob("*.safetensors"))) > 2
    return folder / family
