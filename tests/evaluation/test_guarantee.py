"""Bounds that hold with the stated probability, and name what they were computed from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation import (
    Guarantee,
    TaskSettings,
    agreement,
    guarantee,
    mean_upper_bound,
    required_units,
    run_tasks,
    task_config_from_rows,
)
from streamline_hooks.surgery import PromptSkip
from tests.tiny_models import left_padded, tiny_model, tokens

Draw = Callable[[np.random.Generator, int], np.ndarray]
SOURCES: dict[str, tuple[float, Draw]] = {
    "rare errors": (0.1, lambda random, count: (random.random(count) < 0.1).astype(float)),
    "fractions": (0.1, lambda random, count: random.beta(1, 9, count)),
    "paired scores": (0.49, lambda random, count: random.choice([0.0, 0.5, 1.0], p=[0.06, 0.90, 0.04], size=count)),
    "two values": (0.5, lambda random, count: random.integers(0, 2, count).astype(float)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [20, 200])
def test_the_bound_is_exceeded_at_most_as_often_as_stated(source: str, count: int) -> None:
    expectation, draw = SOURCES[source]
    random = np.random.default_rng(0)
    bounds = [mean_upper_bound(draw(random, count).tolist(), 0.1, seed=k) for k in range(1000)]
    assert np.mean(np.array(bounds) < expectation) <= 0.1 + 3 * (0.1 * 0.9 / 1000) ** 0.5


@pytest.mark.parametrize("source", ["rare errors", "paired scores"])
def test_the_bound_is_at_most_half_as_wide_again_as_that_of_the_bootstrap(source: str) -> None:
    expectation, draw = SOURCES[source]
    random = np.random.default_rng(0)
    widths: dict[str, list[float]] = {"bound": [], "bootstrap": []}
    for seed in range(50):
        losses = draw(random, 1000)
        means = random.choice(losses, (1000, len(losses))).mean(axis=1)
        widths["bootstrap"].append(float(np.quantile(means, 0.95)) - expectation)
        widths["bound"].append(mean_upper_bound(losses.tolist(), seed=seed) - expectation)
    assert 0 < np.mean(widths["bootstrap"]) < np.mean(widths["bound"]) < 1.5 * np.mean(widths["bootstrap"])


@given(losses=st.lists(st.floats(0, 1), min_size=1, max_size=60), seed=st.integers(0, 9))
def test_the_bound_is_above_the_mean_and_falls_with_delta_and_with_losses(losses: list[float], seed: int) -> None:
    bound = mean_upper_bound(losses, 0.1, seed=seed)
    assert float(np.mean(losses)) <= bound + 1e-4 and bound <= 1
    assert mean_upper_bound(losses, 0.05, seed=seed) >= bound - 1e-4


def test_no_error_in_n_units_gives_the_rule_of_three() -> None:
    assert mean_upper_bound([0.0] * 300) == pytest.approx(3 / 300, rel=0.05)
    assert mean_upper_bound([0.0]) == 1


def test_the_number_of_units_that_are_needed_is_enough_and_not_many_fewer_are() -> None:
    losses = [0.0] * 18 + [0.2] * 2
    count = required_units(losses, 0.04)
    assert count is not None
    assert mean_upper_bound(np.resize(losses, count).tolist()) <= 0.04
    assert mean_upper_bound(np.resize(losses, int(0.8 * count)).tolist()) > 0.04
    assert required_units(losses, 0.02) is None


def test_the_number_of_units_depends_neither_on_the_order_nor_on_a_lucky_beginning() -> None:
    losses = [0.0] * 180 + [0.5] * 220  # the first ones are better than the limit
    counts = {required_units(values, 0.3) for values in (losses, losses[::-1], losses[::2] + losses[1::2])}
    assert len(counts) == 1 and 300 < (counts.pop() or 0) < 500
    statement = Guarantee("disagreement", mean_upper_bound(losses), tuple(losses), 0.05, "8e1c")
    assert statement.bound > 0.3 and (statement.required_units(0.3) or 0) > 400
    lucky = Guarantee("disagreement", 0.31, (0.0,) * 400, 0.05, "8e1c")
    assert lucky.required_units(0.3) == 401, "more than those that were not enough"


def pair() -> tuple[Any, Any]:
    """A model and a copy without two blocks."""
    original = tiny_model("llama")
    compressed = copy.deepcopy(original)
    with LayerSurgeon(compressed) as surgeon:
        surgeon.remove([2, 3])
        surgeon.commit()
    return original, compressed


def test_a_document_counts_once_and_padding_does_not_count() -> None:
    original, compressed = pair()
    batches = [{"input_ids": tokens(3, 9, seed=5)}, left_padded(3, 9)]
    statement = guarantee(original, compressed, batches)
    by_row = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for row in range(3):
            with torch.no_grad():
                logits = [model(**batch).logits[row][mask[row]] for model in (original, compressed)]
            by_row.append(float((logits[0].argmax(dim=-1) != logits[1].argmax(dim=-1)).float().mean()))
    assert statement.units == 6 and statement.mean == pytest.approx(np.mean(by_row))
    assert statement.bound == pytest.approx(mean_upper_bound(by_row))
    assert len(statement.fingerprint) == 16 and "6 documents" in str(statement)
    assert guarantee(original, compressed, batches[:1]).fingerprint != statement.fingerprint


def test_the_divergence_is_that_of_agreement_unless_it_is_clipped() -> None:
    original, compressed = pair()
    batches = [tokens(4, 9, seed=k) for k in range(3)]
    statement = guarantee(original, compressed, batches, "kl", clip=50.0)
    assert statement.mean == pytest.approx(agreement(compressed, original, batches).kl, rel=1e-4)
    assert statement.mean < statement.bound <= 50
    clipped = guarantee(original, compressed, batches, "kl", clip=0.01)
    assert clipped.mean < statement.mean and clipped.mean <= clipped.bound <= 0.01 + 1e-9


@pytest.mark.parametrize("clip", [0.05, 0.1])
def test_a_clip_that_is_no_float32_bounds_the_losses(clip: float) -> None:
    original, compressed = pair()
    with torch.no_grad():
        compressed.lm_head.weight.mul_(-30)  # each token is clipped
    statement = guarantee(original, compressed, [tokens(4, 9)], "kl", clip=clip)
    assert statement.losses == (clip,) * 4 and statement.bound == pytest.approx(clip)


@pytest.mark.parametrize("measure", ["disagreement", "kl"])
def test_a_forward_pass_says_nothing_of_a_model_whose_prompts_skip_blocks(
    measure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    original = tiny_model("llama")
    skipping = copy.deepcopy(original)
    with PromptSkip(skipping, range(2, 4), last_tokens=1) as skip:
        skip.commit()
    for models in ((original, skipping), (skipping, original)):
        with pytest.raises(StreamlineError, match="skip blocks.*Use measure='accuracy_drop'"):
            guarantee(*models, [tokens(2, 9)], measure)
    assert agreement(skipping, original, [tokens(2, 9)]).kl < 1e-6
    assert "skip blocks, but this measurement runs all of them" in caplog.text


def test_a_text_that_occurs_twice_is_found_among_rows_of_other_lengths(
    stories: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = stories
    texts = [f"There were {number} birds in the garden." for number in range(8)]
    texts += ["The birds sang for a long time, and nobody in the house counted them.", texts[0]]
    with pytest.raises(StreamlineError, match="1 of 10 documents occur twice"):
        guarantee(model, copy.deepcopy(model), texts, tokenizer=tokenizer)
    statement = guarantee(model, copy.deepcopy(model), texts[:-1], tokenizer=tokenizer)
    rows = [torch.tensor([tokenizer(text).input_ids]) for text in texts[:-1]]
    assert guarantee(model, copy.deepcopy(model), rows).fingerprint == statement.fingerprint
    with pytest.raises(StreamlineError, match="document 9 has no token"):
        guarantee(model, copy.deepcopy(model), [*texts[:-1], ""], tokenizer=NoSpecialTokens(tokenizer))
    (tmp_path / "held_out.txt").write_text("One text.")
    with pytest.raises(StreamlineError, match=r"held_out.txt' is the name of a file.*read_documents"):
        guarantee(model, copy.deepcopy(model), [str(tmp_path / "held_out.txt")], tokenizer=tokenizer)


class NoSpecialTokens:
    """A tokenizer that adds no special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> Any:
        return dict(self.tokenizer(text, add_special_tokens=False))


def test_a_bound_is_rounded_up() -> None:
    statement = Guarantee("kl", bound=0.12041, losses=(0.1,) * 9, delta=1e-4, fingerprint="8e1c", limits=(0.0, 2.0))
    assert "clipped at 2 nats, at most 0.121 with probability 0.9999 (9 documents" in str(statement)


def test_an_equal_model_has_no_loss() -> None:
    original, _ = pair()
    statement = guarantee(original, copy.deepcopy(original), [tokens(50, 5)])
    assert statement.mean == 0 and statement.bound < 0.07


ROWS = [{"goal": f"{number} and", "sol1": "one", "sol2": "two", "label": number % 2} for number in range(24)]


def test_the_drop_in_accuracy_is_that_of_the_scores_by_question(stories: tuple[Any, Any]) -> None:
    original, tokenizer = stories
    compressed = copy.deepcopy(original)
    with LayerSurgeon(compressed) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    task = task_config_from_rows(ROWS, "choices")
    settings = TaskSettings(items=20)
    statement = guarantee(original, compressed, [task], "accuracy_drop", tokenizer=tokenizer, settings=settings)
    before, after = (
        run_tasks(model, tokenizer, [task], settings)["choices"].scores for model in (original, compressed)
    )
    drops = np.subtract(before, after)
    assert statement.units == 20 and statement.mean == pytest.approx(drops.mean())
    assert statement.bound == pytest.approx(2 * mean_upper_bound(((1 + drops) / 2).tolist()) - 1)
    assert "20 questions" in str(statement)


def with_ids(config: dict[str, Any]) -> dict[str, Any]:
    """Number the documents of a task, so that copies of a question are different documents."""
    documents = config["custom_dataset"]()["test"]
    numbered = documents.add_column("id", list(range(len(documents))))
    return {**config, "custom_dataset": lambda **_: {"test": numbered}}


def test_questions_that_occur_twice_are_refused(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    for tasks in (
        [task_config_from_rows(ROWS, "one"), task_config_from_rows(ROWS, "other")],
        [task_config_from_rows(ROWS * 2, "twice")],
        [with_ids(task_config_from_rows(ROWS * 2, "other ids"))],
    ):
        with pytest.raises(StreamlineError, match="24 of 48 questions occur twice"):
            guarantee(model, copy.deepcopy(model), tasks, "accuracy_drop", tokenizer=tokenizer)


REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "copies": ([tokens(2, 5), tokens(2, 5)], {}, "2 of 4 documents occur twice"),
    "tasks": (["arc_easy"], {}, "1 documents .*without a tokenizer.*accuracy_drop"),
    "no tokenizer": (["arc_easy"], {"measure": "accuracy_drop"}, "a tokenizer or the tasks are missing"),
    "delta": ([tokens(2, 5)], {"delta": 0.0}, "delta=0.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gives_no_bound_is_refused(case: str) -> None:
    data, options, message = REFUSED[case]
    with pytest.raises(StreamlineError, match=message):
        guarantee(*pair(), data, **options)


@pytest.mark.parametrize("losses", [[], [0.5, 1.2], [float("nan")]])
def test_losses_outside_their_range_are_refused(losses: list[float]) -> None:
    with pytest.raises(StreamlineError, match="between 0 and 1"):
        mean_upper_bound(losses)
