"""Encoders, encoder-decoders, vision and image-text models are evaluated on batches of their own task."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from streamline_hooks import LayerSurgeon, StreamlineError, evaluate, perplexity
from streamline_hooks.core import prepare_inputs
from streamline_hooks.evaluation import Suite, agreement, compare_on_batches, embedding_similarity, score_batches
from streamline_hooks.modeling import Task
from streamline_hooks.pipeline import write_report
from tests.image_text_models import BOTH
from tests.other_models import OTHERS, TEXT, made, padded, pictures


def masked_lm() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def make(name: str) -> Any:
    return masked_lm() if name == "masked-lm" else made(name)


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows, padded on the left."""
    found = {}
    mask = batch["attention_mask"].bool()
    for name, value in batch.items():
        rows = [torch.cat([row[~real], row[real]]) for row, real in zip(value, mask, strict=True)]
        found[name] = torch.stack(rows)
    return found


def batches_for(name: str, model: Any, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches whose labels are the model's own answers, but for some."""
    found = []
    for k in range(count):
        batch: dict[str, Tensor]
        if name == "vit":
            batch = {"pixel_values": pictures(4)["pixel_values"] * (k + 1)}
        elif name == "bart decoder":
            batch = padded([9, 5], 9, seed=k) | padded([6, 4], 6, "decoder_", seed=k + 9)
        else:
            batch = padded([9, 5], 9, seed=k)
        with torch.no_grad():
            answers = model(**prepare_inputs(model, batch)).logits.argmax(-1)
        labels = answers.clone()
        labels[0, ...] = (labels[0] + 1) % 5 if labels.ndim == 1 else labels[0]
        if labels.ndim == 2:
            mask = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
            labels[:, 1] = 59  # wrong in each row
            labels[:, 0] = -100  # has no label
            labels = labels.where(mask, -100)
        batch["labels"] = labels
        found.append(batch)
    return found


RIGHT = {"vit": (9, 12), "bert classifier": (3, 6), "masked-lm": (30, 36), "bart decoder": (18, 24)}


@pytest.mark.parametrize("name", RIGHT)
def test_labels_are_compared_with_the_answers_at_their_places(name: str) -> None:
    model = make(name)
    original, batches = copy.deepcopy(model), batches_for(name, model)
    given: list[bool] = []
    watch = original.register_forward_pre_hook(
        lambda _, args, kwargs: given.append("labels" in kwargs), with_kwargs=True
    )
    alone = score_batches(original, batches)
    watch.remove()
    assert any(given) == (alone.unit == "token"), "a classifier's own loss would set its problem_type"
    right, count = RIGHT[name]
    assert (sum(alone.correct), len(alone.correct)) == (right, count) and alone.accuracy == right / count
    stack = OTHERS[name].path(model) if name in OTHERS else None
    with LayerSurgeon(model, stack) as surgeon:
        surgeon.remove([1, 2])
        found = compare_on_batches(model, original, batches)
        expected = agreement(model, original, batches)
        plain: list[bool] = []
        for batch in batches:
            with torch.no_grad():
                answers = model(**prepare_inputs(model, batch)).logits.argmax(-1)
            plain += (answers == batch["labels"])[batch["labels"] != -100].tolist()
    assert list(found.changed.correct) == plain and found.original == alone
    assert found.changed.accuracy <= alone.accuracy
    assert (found.agreement.kl, found.agreement.top1) == (pytest.approx(expected.kl), expected.top1)
    assert found.agreement.unit == Task.of(original).unit and found.similarity is None


@pytest.mark.parametrize("name", ["masked-lm", "bart decoder", "bert classifier"])
def test_the_side_of_the_padding_changes_nothing(name: str) -> None:
    model = make(name)
    right = batches_for(name, model)
    if name == "bart decoder":  # whose positions are learned and counted from the left
        left = [{n: torch.nn.functional.pad(v, (0, 2), value=-100 if n == "labels" else 0) for n, v in batch.items()}
                for batch in right]  # fmt: skip
    else:
        by_token = [{n: v for n, v in batch.items() if v.ndim == 2} for batch in right]
        left = [batch | flipped(one) for batch, one in zip(right, by_token, strict=True)]
    one, other = score_batches(model, right), score_batches(model, left)
    assert one == other


def test_the_error_of_tokens_is_that_of_their_sequences() -> None:
    model = make("masked-lm")
    found = score_batches(model, batches_for("masked-lm", model))
    assert sorted(set(found.rows)) == list(range(6))
    sums = torch.zeros(6, dtype=torch.float64)
    for right, row in zip(found.correct, found.rows, strict=True):
        sums[row] += right - found.accuracy
    assert found.standard_error == pytest.approx(math.sqrt(6 / 5 * float(sums.square().sum())) / 36)


def shortened(name: str) -> tuple[Any, Any]:
    original = BOTH[name][0]() if name in BOTH else make(name)
    model = copy.deepcopy(original)
    with LayerSurgeon(model, None if name in BOTH or name not in OTHERS else OTHERS[name].path(model)) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    return model, original


@pytest.mark.parametrize("name", ["vit", "masked-lm", "bart decoder"])
def test_a_suite_of_batches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = shortened(name)
    suite = Suite(batches={"mine": batches_for(name, original)})
    cache = tmp_path / "cache.json"
    found = evaluate(model, None, suite, original, cache_file=cache)
    assert found.original is not None and found.speed is None and found.mean_perplexity_ratio is None
    kept = compare_on_batches(model, original, suite.batches["mine"])
    assert (found.scores.batches["mine"], found.original.batches["mine"]) == (kept.changed, kept.original)
    (group,) = found.retained
    ratio = found.retained[group].ratio
    assert ratio.value == pytest.approx(kept.changed.accuracy / kept.original.accuracy)
    assert ratio.low < ratio.high and group == ("classification" if name == "vit" else "labeled tokens")
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert report["accuracy"]["mine"]["value"] == kept.changed.accuracy and "perplexity" not in report
    assert report["agreement"].get("unit", "token") == Task.of(original).unit
    table = found.table()
    assert "mine (accuracy)" in table and f"retained, {group}" in table and "KL" in table
    page = write_report(tmp_path, evaluation=report, command="c", title="t").read_text()
    assert f"nats per {'image' if name == 'vit' else 'token'}" in page

    monkeypatch.setattr(sys.modules["streamline_hooks.evaluation.evaluate"], "compare_on_batches", _fails)
    again = evaluate(model, None, suite, original, cache_file=cache)
    assert again.report() == found.report()
    other = Suite(batches={"mine": suite.batches["mine"][1:]})
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(model, None, other, original, cache_file=cache)


def _fails(*args: Any, **options: Any) -> Any:
    raise AssertionError("measured again")


_fails.__name__ = "compare_on_batches"


@pytest.mark.parametrize("count", [1, 2])
def test_embeddings(count: int, tmp_path: Path) -> None:
    """Two rows have no rank correlation, which is no number in the cache or the report."""
    model, original = shortened("bert")
    batches = [padded([9, 5], 9, seed=k) for k in range(count)]
    suite = Suite(batches={"mine": batches}, task=Task("embedding", pooling="first"))
    found = evaluate(model, None, suite, original, cache_file=tmp_path / "cache.json")
    alike = embedding_similarity(model, original, batches, task=suite.task)
    mine = found.similarity["mine"]
    assert (mine.cosine, mine.count) == (pytest.approx(alike.cosine), alike.count) and mine.cosine < 0.999
    assert mine.spearman == pytest.approx(alike.spearman, nan_ok=True) and math.isnan(mine.spearman) == (count == 1)
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert report["similarity"]["mine"]["cosine"] == mine.cosine and not found.retained
    assert "embeddings, mine" in found.table()
    assert "mean cosine, mine" in write_report(tmp_path, evaluation=report, command="c", title="t").read_text()
    with pytest.raises(StreamlineError, match=r"reference=None.*Expected a reference"):
        evaluate(model, None, suite)


@pytest.mark.parametrize("name", BOTH)
def test_an_image_text_model_has_a_perplexity_of_its_words(name: str) -> None:
    from streamline_hooks.data import image_text_parts
    from tests.data.test_image_texts import rows

    model, original = shortened(name)
    batches = image_text_parts(rows(5), BOTH[name][1]("left"), {"test": 5}, batch_size=3)["test"]
    found = evaluate(model, None, Suite(batches={"mine": batches}, timed=None), original)
    assert found.original is not None
    for one, scores in ((model, found.scores), (original, found.original)):
        expected = perplexity(one, batches)
        assert scores.batches["mine"].predicted == expected.tokens
        assert scores.perplexities["mine"] == pytest.approx(expected.value, rel=1e-5)
    assert found.mean_perplexity_ratio == pytest.approx(
        found.scores.perplexities["mine"] / found.original.perplexities["mine"]
    )
    assert found.report()["perplexity"]["mine"]["tokens"] == found.scores.batches["mine"].predicted


def test_what_cannot_be_evaluated() -> None:
    model, original = shortened("vit")
    labeled = batches_for("vit", original)
    bare = [{"pixel_values": batch["pixel_values"]} for batch in labeled]
    with pytest.raises(StreamlineError, match=r"3 batches.*0 of them with labels.*Pass the original"):
        evaluate(model, None, Suite(batches={"mine": bare}))
    assert evaluate(model, None, Suite(batches={"mine": bare}), original).agreement["mine"].tokens == 12
    with pytest.raises(StreamlineError, match=r"suite has text.*ViTForImageClassification.*Use batches"):
        evaluate(model, None, Suite(text={"prose": ["a text"]}), original)
    with pytest.raises(StreamlineError, match=r"mine of the suite are empty"):
        evaluate(model, None, Suite(batches={"mine": []}), original)
    wrong = [{**labeled[0], "labels": torch.zeros(4, 1, dtype=torch.long)}]
    with pytest.raises(StreamlineError, match=r"Expected.*of 4 images"):
        evaluate(model, None, Suite(batches={"mine": wrong}))
    partly = [labeled[0], bare[1]]
    assert not compare_on_batches(model, original, partly).changed.correct, "no accuracy of a part"
