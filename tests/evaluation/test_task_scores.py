"""How a changed model does at its task, against plain computations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation import TaskScores, agreement, embedding_similarity, score_batches
from streamline_hooks.modeling import Task
from tests.other_models import OTHERS, made, pictures


def labeled(model: Any, count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Images whose labels are what the model says of all but the first of each batch."""
    batches = [{"pixel_values": pictures(4)["pixel_values"] * (k + 1)} for k in range(count)]
    for batch in batches:
        with torch.no_grad():
            said = model(**batch).logits.argmax(-1)
        said[0] = (said[0] + 1) % 5
        batch["labels"] = said
    return batches


def test_a_classifier() -> None:
    model = made("vit")
    original, batches = copy.deepcopy(model), labeled(model)
    scores = TaskScores(model, batches, Task.of(model))
    assert scores.original == {"kl": 0.0, "top1": 1.0, "accuracy": 0.75}
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        found = scores.of(model)
        alike = agreement(model, original, batches)
        with torch.no_grad():
            right = torch.cat([model(b["pixel_values"]).logits.argmax(-1) == b["labels"] for b in batches])
    assert (found["kl"], found["top1"]) == (pytest.approx(alike.kl, rel=1e-5), alike.top1)
    assert found["accuracy"] == float(right.double().mean()) < 0.75
    assert "same top-1 class" in str(alike) and "of 12 images" in str(alike) and "nats per image" in str(alike)
    without = TaskScores(original, [{"pixel_values": one["pixel_values"]} for one in batches], Task.of(model))
    assert set(without.original) == {"kl", "top1"}, "there is no accuracy without labels"


@pytest.mark.parametrize("name", ["bert", "dinov2", "clip text"])
def test_an_encoder(name: str) -> None:
    model, case = made(name), OTHERS[name]
    other = {k: v.flip(-1) if v.is_floating_point() else v.where(v < 3, 62 - v) for k, v in case.batch.items()}
    original, batches = copy.deepcopy(model), [case.batch, other]
    scores = TaskScores(model, batches, Task.of(model))
    assert scores.original["cosine"] == pytest.approx(1.0)
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])
        found, alike = scores.of(model), embedding_similarity(model, original, batches)
    assert found["cosine"] == pytest.approx(alike.cosine) and found["cosine"] < 0.999
    assert found["spearman"] == pytest.approx(alike.spearman, abs=1e-6)


@pytest.mark.parametrize("name", ["t5 decoder", "bart encoder"])
def test_an_encoder_with_a_decoder(name: str) -> None:
    model, case = made(name), OTHERS[name]
    original = copy.deepcopy(model)
    scores = TaskScores(model, [case.batch], Task.of(model))
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])
        found, alike = scores.of(model), agreement(model, original, [case.batch])
    assert found == {"kl": pytest.approx(alike.kl, rel=1e-5), "top1": alike.top1}
    assert alike.tokens == int(case.batch["decoder_attention_mask"].sum()) and alike.kl > 1e-3


def test_what_cannot_be_scored() -> None:
    model = made("vit")
    with pytest.raises(StreamlineError, match="batches is empty"):
        TaskScores(model, [], Task.of(model))
    with pytest.raises(StreamlineError, match=r"embeddings.*KL.*embedding_similarity"):
        agreement(made("bert"), made("bert"), [OTHERS["bert"].batch])
    empty = {name: torch.zeros(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    from streamline_hooks.testing import tiny_model

    with pytest.raises(StreamlineError, match=r"no real token.*Pass"):
        TaskScores(tiny_model("gpt2"), [empty], Task("causal-lm"))


WRONG = [torch.zeros(4, 1, dtype=torch.long), torch.eye(4, 5), torch.zeros(3, dtype=torch.long)]


@pytest.mark.parametrize("labels", WRONG)
def test_labels_are_one_class_each(labels: torch.Tensor) -> None:
    """Others would be compared with every answer, and the accuracy be above one."""
    model, batch = made("vit"), {**pictures(4), "labels": labels}
    with pytest.raises(StreamlineError, match=r"Expected.*of 4"):
        TaskScores(model, [batch], Task("image-classification"))
    assert model.config.problem_type is None


def test_outputs_without_a_label_do_not_count() -> None:
    model = made("vit")
    batches = labeled(model)
    for batch in batches:
        batch["labels"][1] = -100
    assert TaskScores(model, batches, Task.of(model)).original["accuracy"] == pytest.approx(2 / 3)
    assert score_batches(model, batches).accuracy == pytest.approx(2 / 3)
    hidden = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    assert set(TaskScores(model, hidden, Task.of(model)).original) == {"kl", "top1"}


@pytest.mark.parametrize("wrong", [-1, 5])
def test_labels_that_are_no_class_are_refused(wrong: int) -> None:
    model = made("vit")
    batches = labeled(model)
    batches[1]["labels"][2] = wrong
    for run in (lambda: score_batches(model, batches), lambda: TaskScores(model, batches, Task.of(model))):
        with pytest.raises(StreamlineError, match=f"has the label {wrong}. Expected class indices from 0 to 4"):
            run()
