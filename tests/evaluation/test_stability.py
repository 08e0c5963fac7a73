"""Stability against examples worked by hand, against the published script's mistake, and on real models."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation.choices import ChoiceScores, score_choices
from streamline_hooks.evaluation.questions import Question
from streamline_hooks.evaluation.stability import Stability, stability


def scores(
    loglikelihoods: list[tuple[float, ...]], gold: list[int], tokens: list[tuple[int, ...]] | None = None
) -> ChoiceScores:
    lengths = tuple((4,) * len(found) for found in loglikelihoods)
    each = tuple(tokens) if tokens else tuple((1,) * len(found) for found in loglikelihoods)
    return ChoiceScores(tuple(loglikelihoods), lengths, tuple(gold), each)


# Three questions. Mean nats a token of the original's choices: (1, 3), (2, 3), (2, 2, 5); of the population, deviations
# 1, 1/2 and √2. The original answers 1, 0 and 1 of gold 0, 1 and 0, that is right, wrong, right.
ORIGINAL = scores([(-2.0, -6.0), (-2.0, -9.0), (-2.0, -4.0, -5.0)], [0, 1, 0], [(2, 2), (1, 3), (1, 2, 1)])
DEVIATIONS = (1.0, 0.5, math.sqrt(2.0))


def test_by_hand() -> None:
    """The changed model is right, right and wrong: alike about the first question alone."""
    changed = scores([(-1.0, -2.0), (-3.0, -1.0), (-3.0, -1.0, -2.0)], [0, 1, 0])
    found = stability(changed, ORIGINAL)
    total = math.e**1.0 + math.e**0.5 + math.e ** math.sqrt(2.0)
    assert found.same == (True, False, False)
    assert found.weights == pytest.approx([math.exp(d) / total for d in DEVIATIONS], rel=1e-12)
    assert found.value == pytest.approx(math.e / total, rel=1e-12) == pytest.approx(0.3205, abs=1e-4)
    assert found.share == pytest.approx(1 / 3)
    assert found.effective == pytest.approx(total**2 / sum(math.exp(2 * d) for d in DEVIATIONS))
    assert str(found) == "stability 32.1%, 33.3% with equal weights; the weights are those of 2.7 of 3 questions"


def test_each_question_brings_its_own_weight() -> None:
    """The published script adds the first weights up: one here for each of the three would give the same number."""
    values = []
    for alike in range(3):
        right = [(k == alike) == was for k, was in enumerate(ORIGINAL.right)]
        found = [(-1.0, -2.0) if r == (gold == 0) else (-2.0, -1.0) for r, gold in zip(right, (0, 1, 0), strict=True)]
        changed = scores([*found[:2], (*found[2], -9.0)], [0, 1, 0])
        values.append(stability(changed, ORIGINAL).value)
    weights = np.exp(DEVIATIONS) / np.exp(DEVIATIONS).sum()
    assert values == pytest.approx(weights.tolist()) and len(set(values)) == 3


def test_perplexities_by_hand() -> None:
    found = stability(ORIGINAL, ORIGINAL, spread="perplexity")
    deviations = [np.std(np.exp(nats)) for nats in ((1.0, 3.0), (2.0, 3.0), (2.0, 2.0, 5.0))]
    expected = np.exp(np.array(deviations) - max(deviations))
    assert found.weights == pytest.approx((expected / expected.sum()).tolist(), rel=1e-9)
    assert found.effective == pytest.approx(1.0, abs=1e-9)  # which the text says


@pytest.mark.parametrize("spread", ["nats", "perplexity"])
def test_perplexities_that_no_number_holds(spread: Any) -> None:
    """e^2000, twice; and choices that are all alike, which weigh least."""
    huge = [(-1.0, -2000.0), (-3.0, -3.0), (-1.0, -2000.0), (-1.0, -1.5)]
    found = stability(scores(huge, [0] * 4), scores(huge, [0] * 4), spread=spread)
    assert found.weights == pytest.approx([0.5, 0.0, 0.5, 0.0]) and found.value == pytest.approx(1.0)
    flat = [(-3.0, -3.0), (-1e5, -1e5)]
    found = stability(scores(flat, [0, 1]), scores(flat, [0, 1]), spread=spread)
    assert found.weights == (0.5, 0.5)


@given(
    st.lists(st.tuples(*[st.floats(-700.0, -0.01)] * 3, st.integers(0, 2)), min_size=1, max_size=12),
    st.sampled_from(["nats", "perplexity"]),
    st.randoms(),
)
def test_invariants(drawn: list[tuple[float, float, float, int]], spread: Any, random: Any) -> None:
    gold = [each[3] for each in drawn]
    original = scores([each[:3] for each in drawn], gold)
    other = [tuple(random.sample(each[:3], 3)) for each in drawn]
    changed = scores(other, gold)
    found = stability(changed, original, spread=spread)
    assert math.fsum(found.weights) == pytest.approx(1.0) and all(w >= 0.0 for w in found.weights)
    assert 0.0 <= found.value <= 1.0 + 1e-12 and 1.0 - 1e-9 <= found.effective <= len(drawn) * (1 + 1e-9)
    assert stability(original, original, spread=spread).value == pytest.approx(1.0)
    order = random.sample(range(len(drawn)), len(drawn))
    moved = [scores([part.loglikelihoods[k] for k in order], [gold[k] for k in order]) for part in (changed, original)]
    assert stability(*moved, spread=spread).value == pytest.approx(found.value, abs=1e-12)


def test_what_is_right_may_be_normalised() -> None:
    one = ChoiceScores(((-2.0, -3.0),), ((1, 9),), (0,), ((1, 2),))  # right as it is, wrong by character
    other = ChoiceScores(((-2.0, -9.0),), ((1, 9),), (1,), ((1, 2),))
    assert (one.right, one.right_normalised, other.right, other.right_normalised) == (
        (True,),
        (False,),
        (False,),
        (True,),
    )
    changed = ChoiceScores(((-2.0, -90.0),), ((1, 9),), (0,), ((1, 2),))
    assert stability(changed, one).value == 1.0 and stability(changed, one, normalised=True).value == 0.0


def test_what_cannot_be_compared() -> None:
    with pytest.raises(StreamlineError, match=r"1 questions.*2"):
        stability(scores([(-1.0, -2.0)], [0]), scores([(-1.0, -2.0)] * 2, [0, 0]))
    with pytest.raises(StreamlineError, match=r"1.*0\).*\(1.*\(4.*4\)\).*\(0"):
        stability(scores([(-1.0, -2.0)] * 2, [0, 1]), scores([(-1.0, -2.0)] * 2, [0, 0]))
    with pytest.raises(StreamlineError, match=r"spread='bits'.*'nats'.*'perplexity'"):
        stability(ORIGINAL, ORIGINAL, spread="bits")  # type: ignore[arg-type]


def test_on_a_model_that_was_trained(stories: tuple[Any, Any]) -> None:
    """The tokens that are scored are those of the choices, and a copy is as stable as can be."""
    model, tokenizer = stories
    words = ["dog", "mat", "happy", "little girl", "sun"]
    asked = [
        Question((f"Once upon a time there was a {a}",) * 2, (f"and a {b}", "xq zv"), 0) for a in words for b in words
    ]
    original = score_choices(model, tokenizer, asked)
    for question, counts in zip(asked, original.tokens, strict=True):
        context = tokenizer(question.contexts[0], add_special_tokens=False)["input_ids"]
        for text, count in zip(question.continuations, counts, strict=True):
            whole = tokenizer(f"{question.contexts[0]} {text}", add_special_tokens=False)["input_ids"]
            assert count == len(whole) - len(context)
    assert stability(score_choices(copy.deepcopy(model), tokenizer, asked), original).value == pytest.approx(1.0)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(0, 4))
        broken = score_choices(model, tokenizer, asked)
    found = stability(broken, original)
    assert found.same == tuple(a == b for a, b in zip(broken.right, original.right, strict=True))
    assert found.effective > 5 and isinstance(found, Stability)
