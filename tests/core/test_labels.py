"""Tokens that are predicted: in packed rows no document from the one before it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from streamline_hooks.cli import parse_loss
from streamline_hooks.core.batch import label_mask, shift_labels, split_into_batches
from streamline_hooks.data import pack, packed_batches
from streamline_hooks.distillation import (
    DistillationConfig,
    Objective,
    Student,
    TrainingResult,
    cache_teacher_states,
    train,
)
from streamline_hooks.evaluation import Perplexity, perplexity, perplexity_of_candidates
from streamline_hooks.modeling import Candidate
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model
from tests.tiny_models import left_padded

DOCUMENTS = [[5, 6, 7, 9, 11], [8, 3, 4], [12, 13, 14, 15], [21, 22], [30, 31, 32, 33, 34, 35]]


def apart() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor([document])} for document in DOCUMENTS]


def packed() -> list[dict[str, torch.Tensor]]:
    batches = packed_batches(pack(DOCUMENTS, 10, buffer=8), 1)
    assert max(int((batch["position_ids"] == 0).sum()) for batch in batches) > 1
    return batches


def test_perplexity_of_packed_rows_is_that_of_their_documents() -> None:
    model = tiny_model("llama")
    whole, alone = perplexity(model, packed()), perplexity(model, apart())
    assert whole.tokens == alone.tokens == sum(len(document) - 1 for document in DOCUMENTS)
    assert whole.nll == pytest.approx(alone.nll, rel=1e-6)
    candidates = [Candidate(range(2, 4))]
    original, (removed,) = perplexity_of_candidates(model, packed(), candidates)
    _, (expected,) = perplexity_of_candidates(model, apart(), candidates)
    assert original == whole
    assert removed.nll == pytest.approx(expected.nll, rel=1e-6)


def test_the_text_s_own_loss_leaves_the_same_tokens_out() -> None:
    model, objective = tiny_model("llama"), Objective({"lm": 1.0})

    def loss(batches: list[dict[str, torch.Tensor]]) -> float:
        total = 0.0
        for batch in batches:
            ids = batch["input_ids"]
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits  # with a cache packed rows are not known
            real = torch.ones_like(ids, dtype=torch.bool)
            following = shift_labels(ids, real, batch.get("position_ids"))
            total += float(objective.output_loss(logits.flatten(0, 1), following=following.flatten()))
        return total

    assert loss(packed()) == pytest.approx(loss(apart()), rel=1e-6)
    assert loss(packed()) == pytest.approx(perplexity(model, apart()).nll, rel=1e-6)


@pytest.mark.parametrize("objective", ["lm", "kl + lm"])
def test_a_training_learns_the_same_tokens_of_packed_rows(objective: str) -> None:
    settings = DistillationConfig(parse_loss(objective), learning_rate=1e-3, warmup_ratio=0.0)

    def trained(batches: list[dict[str, torch.Tensor]]) -> TrainingResult:
        steps = replace(settings, gradient_accumulation_steps=len(batches))  # one step on all of them
        return train(Student(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))]), batches, batches, steps)

    rows, documents = trained(packed()), trained(apart())
    for one, other in zip(rows.history, documents.history, strict=True):
        assert one["validated"] == pytest.approx(other["validated"], rel=1e-5)
    assert rows.history[-1]["loss"] == pytest.approx(documents.history[-1]["loss"], rel=1e-5)
    assert rows.history[-1]["step"] == 1 and rows.history[-1]["validated"] != rows.history[0]["validated"]


def test_a_training_runs_the_documents_of_a_packed_row_apart() -> None:
    model = tiny_model("llama")
    student = Student(model, [(range(2, 4), LinearReplacement(32))])

    def said(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        rows = []
        with cache_teacher_states(model, batches, 2) as taught, torch.no_grad():
            for one, batch in zip(taught.batches, batches, strict=True):
                output, _ = student.run(one.entrance, batch, logits=True, states=False)
                assert one.exit is not None
                both = torch.cat([output.logits[0], student.original_answers(one.exit, batch)], dim=-1)
                rows += [torch.cat([i[:, None], row], -1) for i, row in zip(batch["input_ids"], [both], strict=True)]
        found = torch.cat(rows)
        return found[found[:, 0].argsort(stable=True)]  # every token is there once

    assert len({token for document in DOCUMENTS for token in document}) == sum(map(len, DOCUMENTS))
    assert torch.allclose(said(packed()), said(apart()), atol=1e-5)


def test_positions_that_say_nothing_of_documents_change_nothing() -> None:
    real = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    expected = real[:, 1:] & real[:, :-1]
    for positions in (None, torch.arange(5)[None], (real.cumsum(1) - 1).clamp_min(0), torch.zeros(3, 2, 5)):
        assert torch.equal(label_mask(real, positions), expected)
    model, padded = tiny_model("llama"), left_padded(2, 8)
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    given = perplexity(model, [{**padded, "position_ids": positions}])
    assert given.tokens == perplexity(model, [padded]).tokens
    assert math.isfinite(given.value)


def test_nothing_packed_is_as_before() -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 43).view(4, 10)
    with torch.no_grad():
        logits = model(ids).logits.double().log_softmax(-1)
    by_hand = -float(logits[:, :-1].gather(-1, ids[:, 1:, None]).sum())
    found = perplexity(model, split_into_batches(ids, 4))
    assert found == Perplexity(pytest.approx(by_hand, rel=1e-6), 36)
