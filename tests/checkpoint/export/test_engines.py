"""SmolLM2, compressed to plain models, runs in engines that know nothing of this library, and says the same there.

These run in the environment of ``make engines``, which builds llama.cpp, and skip elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, fit_windows
from streamline_hooks.checkpoint import export_gguf
from streamline_hooks.cli import parse_replacement
from streamline_hooks.repair import insert_replacement
from tests.checkpoint.export.llama_cpp_engine import Answer, in_llama_cpp, in_transformers
from tests.checkpoint.export.small_tokenizer import small_tokenizer
from tests.checkpoint.export.test_gguf import linear_attention, llama
from tests.checkpoint.export.test_gguf_architectures import NAMES, cut, original
from tests.checkpoint.export.test_onnx import run, session_of

pytestmark = pytest.mark.slow

WINDOW = range(12, 16)
TEXT = (
    "The for statement is used to iterate over the elements of a sequence, such as a string, tuple or list, or over "
    "another iterable object. An expression list is evaluated once and yields an iterable object. When the items are "
    "exhausted, the loop ends. A break statement in the first suite ends it without the rest of the loop."
)


@pytest.fixture(scope="module")
def compressed(smollm2: tuple[Any, Any]) -> dict[str, Any]:
    """SmolLM2 by kind."""
    found = {}
    for kind in ("none", "block", "folded", "silenced"):
        model = copy.deepcopy(smollm2[0])
        ids = smollm2[1](TEXT, return_tensors="pt").input_ids
        text = [ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 :]]
        (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), text[:1], text[1:])
        with LayerSurgeon(model) as surgeon:
            insert_replacement(surgeon, WINDOW, repair.replacement_module)
            surgeon.commit(kind=kind)
        found[kind] = model
    return found


def assert_same(found: Sequence[Answer], expected: Sequence[Answer], atol: float) -> None:
    """Compare all tokens up to the first one that is within the tolerance of another token."""
    for a, b in zip(found, expected, strict=True):
        count = next((k for k, margin in enumerate(b.margins) if margin < 2 * atol), len(b.tokens))
        assert a.tokens[:count] == b.tokens[:count] and len(a.tokens) == len(b.tokens)
        torch.testing.assert_close(a.log_probabilities[:count], b.log_probabilities[:count], rtol=0, atol=atol)


def exact(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("kind", ["none", "block", "folded", "silenced"])
def test_llama_cpp_says_the_same(
    kind: str, compressed: dict[str, Any], smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = compressed[kind], smollm2[1]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    architecture = export_gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path / "tokenizer")
    assert architecture == ("deci" if kind == "silenced" else "llama")
    words = TEXT.split()
    prompts = [tokenizer(" ".join(words[k : k + 3 + 2 * k])).input_ids for k in range(8)]
    found = in_llama_cpp(tmp_path / "model.gguf", prompts, 32, slots=8)
    expected = in_transformers(model, prompts, 32, never=tokenizer.eos_token_id)
    assert_same(found, expected, atol=1e-3)
    assert exact(found) == exact(expected)


def test_text_is_split_into_the_same_tokens(stories: tuple[Any, Any], smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    """One tokenizer falls back to bytes and adds BOS, the other is of bytes and adds none."""
    for name, (model, tokenizer) in {"stories": stories, "smollm2": smollm2}.items():
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        export_gguf(model, folder / "model.gguf", tokenizer=folder)
        texts = [TEXT[:80], "Once upon a time there was a little girl who wanted something. ", "naïve ☃ 12345\n\n\tx"]
        ids = [tokenizer(text).input_ids for text in texts]
        found, expected = (in_llama_cpp(folder / "model.gguf", prompts, 16) for prompts in (texts, ids))
        assert exact(found) == exact(expected)


def small_prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary - 1, (length,), generator=generator).tolist() for length in (5, 9, 14)]


@pytest.mark.parametrize("model_type", NAMES)
def test_each_architecture_says_the_same(model_type: str, tmp_path: Path) -> None:
    model, tanh = original(model_type), ("gemma", "gpt", "phi", "starcoder")
    atol = 1e-2 if model_type.startswith(tanh) and model_type != "phi3" else 1e-4  # a table in half precision
    folder, prompts = small_tokenizer(tmp_path / "tokenizer", model.config.vocab_size), small_prompts(64)
    for removed in ([], [1] if model_type != "smollm3" else [0, 1, 2, 3]):
        if removed:
            cut(model, *removed)
        export_gguf(model, tmp_path / "model.gguf", tokenizer=folder)
        expected = in_transformers(model, prompts, 32, never=2)
        assert_same(in_llama_cpp(tmp_path / "model.gguf", prompts, 32), expected, atol)


@pytest.mark.parametrize("zeroed", [[0], [1, 2], [3], [0, 1, 2, 3]], ids=["first", "middle", "last", "all"])
def test_blocks_without_attention(zeroed: list[int], tmp_path: Path) -> None:
    model = llama(hidden_size=64, intermediate_size=64, num_hidden_layers=4, vocab_size=64)
    with LayerSurgeon(model) as surgeon:
        for k in zeroed:
            surgeon.zero_branch(k, "attention")
        if len(zeroed) < 4:
            surgeon.zero_branch(next(k for k in range(4) if k not in zeroed), "mlp")
        surgeon.commit()
    left_out, folder = (
        [k for k in zeroed if k],
        small_tokenizer(tmp_path / "tokenizer", 64),
    )  # the first keeps its zeros
    assert export_gguf(model, tmp_path / "small.gguf", tokenizer=folder) == ("deci" if left_out else "llama")
    export_gguf(model, tmp_path / "whole.gguf", tokenizer=folder, skip_zeroed_attention=False)
    expected = in_transformers(model, small_prompts(64), 24, never=2)
    for name in ("small", "whole"):
        assert_same(in_llama_cpp(tmp_path / f"{name}.gguf", small_prompts(64), 24), expected, atol=1e-3)
    block = model.model.layers[0]
    gone = len(left_out) * 4 * (sum(p.numel() for p in block.self_attn.parameters()) + 64)
    saved = (tmp_path / "whole.gguf").stat().st_size - (tmp_path / "small.gguf").stat().st_size
    assert abs(saved - gone) < 2048


def test_blocks_with_a_linear_attention(tmp_path: Path) -> None:
    model = llama(hidden_size=64, intermediate_size=64, num_hidden_layers=4, vocab_size=64)
    with LayerSurgeon(model) as surgeon:
        for k in (1, 2, 3):
            surgeon.zero_branch(k, "attention")
        for k in (1, 3):
            surgeon.insert(k, linear_attention(model, seed=k))
        surgeon.commit()
    folder = small_tokenizer(tmp_path / "tokenizer", 64)
    assert export_gguf(model, tmp_path / "model.gguf", tokenizer=folder) == "deci"
    expected = in_transformers(model, small_prompts(64), 24, never=2)
    assert_same(in_llama_cpp(tmp_path / "model.gguf", small_prompts(64), 24), expected, atol=1e-3)


def test_onnx_runtime_says_the_same(compressed: dict[str, Any], smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    ids = smollm2[1](TEXT, return_tensors="pt").input_ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}
    for kind in ("none", "folded"):
        model: nn.Module = compressed[kind]
        (tmp_path / kind).mkdir()
        logits = run(session_of(model, tmp_path / kind), batch)[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(logits), model(ids).logits, rtol=0, atol=1e-4)
