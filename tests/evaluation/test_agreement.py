"""KL and top-1 agreement of two models in memory against NumPy, whatever the batches are."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tqdm import tqdm

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.core import prepare_inputs
from streamline_hooks.evaluation import Agreement, agreement, distances_of_candidates
from streamline_hooks.evaluation import agreement as exported
from streamline_hooks.evaluation.agreement import KLHistogram, compare_logits
from streamline_hooks.modeling import Candidate
from tests.tiny_models import FAMILIES, VOCABULARY, padded, repaired, shuffled_batches, tiny_model, tokens


def logits_of_row(model: nn.Module, ids: torch.Tensor) -> np.ndarray:
    """A sequence alone, without padding."""
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0].double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(model: nn.Module, original: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, float, int]:
    """Mean KL, share of equal first choices, and tokens, each sequence run alone."""
    kls, same = [], []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        p, q = (log_softmax(logits_of_row(m, ids[mask.bool()])) for m in (original, model))
        kls += list((np.exp(p) * (p - q)).sum(-1))
        same += list(p.argmax(-1) == q.argmax(-1))
    return float(np.mean(kls)), float(np.mean(same)), len(kls)


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(st.integers(1, 6), st.sampled_from(["left", "right"]), st.randoms(use_true_random=False))
def test_it_equals_sequences_alone_whatever_the_batches(family: str, size: int, side: str, random: Random) -> None:
    original, model = tiny_model(family, torch.float64), repaired(family, dtype=torch.float64)
    batch = padded([9, 1, 40, 7, 33], side)  # more tokens than are compared at once
    got = agreement(model, original, shuffled_batches(batch, size, random))
    kl, top1, count = reference(model, original, batch)
    assert got.tokens == count == 90
    assert got.kl == pytest.approx(kl, rel=1e-5) and kl > 0.01
    assert got.top1 == top1 and 0.0 < top1 < 1.0


def test_a_shift_by_one_token_does_not_pass() -> None:
    """A planted fault: the changed model's logits are those of the token before."""
    original, model = tiny_model("llama", torch.float64), repaired("llama", dtype=torch.float64)
    batch = padded([9, 12], "left")
    kl, top1, _ = reference(model, original, batch)
    same = copy.deepcopy(original)
    for late in (model, same):
        late.register_forward_hook(lambda m, a, output: setattr(output, "logits", output.logits.roll(1, dims=1)))
    got = agreement(model, original, [batch])
    assert got.kl != pytest.approx(kl, rel=1e-2) and got.top1 != top1
    assert agreement(same, original, [batch]).kl > 0.1


def test_padding_that_is_counted_does_not_pass() -> None:
    original, model = tiny_model("gpt2", torch.float64), repaired("gpt2", dtype=torch.float64)
    batch = padded([4, 12], "left")
    right = agreement(model, original, [batch])
    with torch.no_grad():
        each = [m(**prepare_inputs(m, batch)).logits for m in (original, model)]
    assert compare_logits(*(logits[batch["attention_mask"].bool()] for logits in each)) == right
    wrong = compare_logits(*(logits.flatten(0, 1) for logits in each))
    assert wrong.kl != pytest.approx(right.kl, rel=1e-3)


def test_known_agreement() -> None:
    """Of 40 tokens the changed model puts another one first for 10; where they differ the KL is known."""
    p = torch.zeros(40, 2)
    p[:, 0] = 2.0
    q = p.clone()
    q[:10] = q[:10].flip(-1)
    got = compare_logits(p, q)
    high, low = np.exp(2.0) / (1 + np.exp(2.0)), 1 / (1 + np.exp(2.0))
    assert (got.same, got.tokens, got.top1) == (30, 40, 0.75)
    assert got.nats == pytest.approx(10 * (high * np.log(high / low) + low * np.log(low / high)), rel=1e-5)
    flat = torch.zeros(4, 5)  # of equal ones both take the first
    assert compare_logits(flat, flat).top1 == 1.0


def test_a_copy_agrees_wholly_and_both_keep_their_modes() -> None:
    original = tiny_model("llama").train()
    model = copy.deepcopy(original)
    model.model.layers[2].eval()
    got = exported(model, original, [tokens(2, 5), tokens(1, 3)])
    assert (got.nats, got.top1, got.tokens) == (0.0, 1.0, 13)
    assert original.training and model.training and not model.model.layers[2].training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_it_is_the_kl_that_candidates_are_chosen_by() -> None:
    original, batches = tiny_model("qwen3"), [padded([9, 6], "left"), tokens(2, 7)]
    with LayerSurgeon(model := tiny_model("qwen3")) as surgeon:
        surgeon.remove(range(1, 3))
        got = agreement(model, original, batches)
    assert [got.kl] == pytest.approx(distances_of_candidates(original, batches, [Candidate(range(1, 3))]), rel=1e-5)
    half = sum((agreement(repaired("qwen3"), original, [b]) for b in batches), Agreement())
    whole = agreement(repaired("qwen3"), original, batches)
    assert half.kl == pytest.approx(whole.kl, rel=1e-12) and half.top1 == whole.top1


def test_another_precision() -> None:
    original, model = tiny_model("llama"), tiny_model("llama", torch.bfloat16)
    got = agreement(model, original, [tokens(4, 12)])
    assert 0.0 < got.kl < 0.01 and got.top1 > 0.8


def test_what_cannot_be_compared() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"agrees with itself.*Keep"):
        agreement(model, model, [tokens(1, 4)])
    other = copy.deepcopy(model)
    other.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    with pytest.raises(StreamlineError, match=rf"\(4.*{VOCABULARY + 3}\).*\(4.*{VOCABULARY}\)"):
        agreement(other, model, [tokens(1, 4)])
    for empty in ([], [{"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 4).long()}]):
        with pytest.raises(StreamlineError, match="No token"):
            agreement(repaired("llama"), model, empty)
    broken = tiny_model("llama")
    broken.lm_head.weight.data[3] = torch.inf
    for name, pair in {"changed model": (broken, model), "original": (model, broken)}.items():
        with pytest.raises(StreamlineError, match=rf"{name}'s.*NaN.*1\)"):
            agreement(*pair, [first_tokens_only(), tokens(1, 4)])


def first_tokens_only() -> dict[str, Any]:
    """A batch without a real token, whose values are nobody's business."""
    return {"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 4).long()}


def test_the_bar_moves_with_each_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[int, int]] = []

    class Watched(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            moves.append((int(n or 0), int(self.total)))
            return super().update(n)

    monkeypatch.setattr("streamline_hooks.core.progress.tqdm", Watched)
    batches = [{"input_ids": tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}] * 2
    distances_of_candidates(tiny_model("llama"), batches, [Candidate(range(k, k + 1)) for k in (1, 2, 3)])
    assert moves == [(10, 80)] * 8


NATS = st.floats(1e-7, 900.0)


@given(st.lists(NATS, min_size=1, max_size=40), st.lists(NATS, max_size=40), st.floats(0.0, 1.0))
def test_quantiles_are_within_a_bin(first: list[float], second: list[float], share: float) -> None:
    total = KLHistogram.of(torch.tensor(first, dtype=torch.float64)) + KLHistogram.of(torch.tensor(second))
    assert sum(total.counts) == len(first) + len(second)
    expected = np.quantile(first + second, share, method="inverted_cdf")
    assert total.quantile(share) == pytest.approx(expected, rel=0.02)


def test_what_is_out_of_range() -> None:
    found = KLHistogram.of(torch.tensor([0.0, -1e-9, 1e-12, 5e5]))
    assert [found.quantile(q) for q in (0.5, 0.75)] == [0.0, 0.0]
    assert found.quantile(1.0) == pytest.approx(1e3, rel=0.02)
    with pytest.raises(StreamlineError, match="histogram is empty"):
        KLHistogram().quantile(0.5)
