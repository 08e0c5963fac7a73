"""Perplexity and KL against plain computations on whole models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import LayerSurgeon, StreamlineError, perplexity
from streamline_hooks.core import prepare_inputs
from streamline_hooks.evaluation import distances_of_candidates, perplexity_of_candidates
from streamline_hooks.modeling import Candidate, get_logits
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, tiny_model, tokens

WINDOWS = [range(0, 2), range(2, 5), range(3, BLOCKS)]


@given(st.sampled_from(FAMILIES), st.booleans())
def test_perplexity_equals_the_models_own_loss(family: str, padded: bool) -> None:
    model = tiny_model(family)
    batch = left_padded(3, 9) if padded else {"input_ids": tokens(3, 9), "attention_mask": torch.ones(3, 9).long()}
    rows = [(i[m.bool()], m) for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    with torch.no_grad():
        losses = [(model(ids[None], labels=ids[None]).loss.item() * (len(ids) - 1), len(ids) - 1) for ids, _ in rows]
    expected = math.exp(sum(a for a, _ in losses) / sum(n for _, n in losses))
    got = perplexity(model, [batch])
    assert got.tokens == sum(n for _, n in losses)
    assert got.value == pytest.approx(expected, rel=1e-5)


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("module", [None, Nudge()], ids=["removed", "replaced"])
def test_candidates_are_measured_as_the_whole_model_would_be(family: str, module: Nudge | None) -> None:
    """The states at the entrance are shared, and nothing is lost by it."""
    model = tiny_model(family)
    batches = [left_padded(3, 9), left_padded(2, 7, seed=1)]
    candidates = [Candidate(window, module) for window in WINDOWS]
    original, each = perplexity_of_candidates(model, batches, candidates)
    kls = distances_of_candidates(model, batches, candidates)
    assert original.value == pytest.approx(perplexity(model, batches).value, rel=1e-6)
    for candidate, measured, kl in zip(candidates, each, kls, strict=True):
        sums, count = 0.0, 0
        with torch.no_grad(), LayerSurgeon(model) as surgeon:
            before = [surgeon.model(**prepare_inputs(model, b)).logits for b in batches]
            surgeon.replace(candidate.window, candidate.module)
            assert measured.value == pytest.approx(perplexity(model, batches).value, rel=1e-5)
            for batch, logits in zip(batches, before, strict=True):
                real = batch["attention_mask"].bool()
                p = logits[real].double().log_softmax(-1)
                q = model(**prepare_inputs(model, batch)).logits[real].double().log_softmax(-1)
                sums, count = sums + (p.exp() * (p - q)).sum().item(), count + int(real.sum())
        assert kl == pytest.approx(sums / count, rel=1e-4)


def test_no_block_before_a_window_is_run_again() -> None:
    model, called = tiny_model("llama"), []
    for k, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, a, o, k=k: called.append(k))
    distances_of_candidates(model, [tokens(2, 5)], [Candidate(range(1, 4)), Candidate(range(2, 5))])
    assert called == [0, 1, 2, 3, 4, 5, 4, 5, 5]


def test_a_model_without_a_head_says_so() -> None:
    with pytest.raises(StreamlineError, match=r"LlamaModel.*embedding.*next token"):
        perplexity(tiny_model("llama").model, [tokens(1, 4)])
    with pytest.raises(StreamlineError, match=r"without logits.*LM head"):
        get_logits(tiny_model("llama").model(tokens(1, 4)))
    with pytest.raises(StreamlineError, match="No token was predicted"):
        _ = perplexity(tiny_model("llama"), [tokens(1, 1)]).value
