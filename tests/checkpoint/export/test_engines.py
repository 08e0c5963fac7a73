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
from streamline_hooks.checkpoint import export_gguf, export_onnx
from streamline_hooks.cli import parse_replacement
from streamline_hooks.repair import insert_replacement
from tests.checkpoint.export.test_gguf import linear_attention, llama

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is in the environment of `make engines` only")
pytestmark = pytest.mark.slow

WINDOW = range(12, 16)
TEXT = (
    "The for statement is used to iterate over the elements of a sequence, such as a string, tuple or list, or over "
    "another iterable object. An expression list is evaluated once and yields an iterable object. When the items are "
    "exhausted, the loop ends. A break statement in the first suite ends it without the rest of the loop."
)
PROMPT = "The for statement is used to"


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


def engine_of(file: Path) -> Any:
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # the cache is half precision else
    return llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=1, **exact)


def stepwise(engine: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits of each token, given one by one, so that the engine's cache is what it reads."""
    engine.reset()
    for token in ids:
        engine.eval([token])
    return torch.tensor(engine.scores[: len(ids)])


def greedy(engine: Any, ids: list[int], count: int) -> list[int]:
    engine.reset()
    engine.eval(ids)
    told: list[int] = []
    for _ in range(count):
        told.append(int(engine.scores[engine.n_tokens - 1].argmax()))
        engine.eval(told[-1:])
    return told


@pytest.mark.parametrize("kind", ["none", "block", "folded", "silenced"])
def test_llama_cpp_says_the_same(
    kind: str, compressed: dict[str, Any], smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = compressed[kind], smollm2[1]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    architecture = export_gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path / "tokenizer")
    assert architecture == ("deci" if kind == "silenced" else "llama")
    engine = engine_of(tmp_path / "model.gguf")
    ids = tokenizer(PROMPT).input_ids
    assert engine.tokenize(PROMPT.encode(), add_bos=False) == ids
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    expected = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert greedy(engine, ids, 32) == expected
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(stepwise(engine, ids), logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("zeroed", [[0], [1, 2], [3], [0, 1, 2, 3]], ids=["first", "middle", "last", "all"])
def test_blocks_without_attention(zeroed: list[int], tmp_path: Path) -> None:
    model = llama(hidden_size=64, intermediate_size=64, num_hidden_layers=4, vocab_size=64)
    with LayerSurgeon(model) as surgeon:
        for k in zeroed:
            surgeon.zero_branch(k, "attention")
        if len(zeroed) < 4:
            surgeon.zero_branch(next(k for k in range(4) if k not in zeroed), "mlp")
        surgeon.commit()
    left_out = [k for k in zeroed if k]  # the first block keeps its zeros
    assert export_gguf(model, tmp_path / "small.gguf") == ("deci" if left_out else "llama")
    export_gguf(model, tmp_path / "whole.gguf", skip_zeroed_attention=False)
    ids = torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    for name in ("small", "whole"):
        found = stepwise(engine_of(tmp_path / f"{name}.gguf"), ids.tolist())
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-3)
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
    assert export_gguf(model, tmp_path / "model.gguf") == "deci"
    ids = torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    found = stepwise(engine_of(tmp_path / "model.gguf"), ids.tolist())
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-3)


def test_onnx_runtime_says_the_same(compressed: dict[str, Any], smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    ids = smollm2[1](TEXT, return_tensors="pt").input_ids
    for kind in ("none", "folded"):
        model: nn.Module = compressed[kind]
        session = runtime.InferenceSession(str(export_onnx(model, tmp_path / f"{kind}.onnx")))
        found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(found), model(ids).logits, rtol=0, atol=1e-4)
