"""Names, users' own criteria, combinations, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.selection.criteria import (
    CRITERIA,
    Criterion,
    combine_criteria,
    register_criterion,
    resolve_criterion,
)
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.selection.selection import best_windows
from streamline_hooks.statistics import Profile, profile
from tests.tiny_models import BLOCKS, tiny_model, tokens

WINDOWS = [range(0, 2), range(1, 3), range(2, 4), range(3, 5)]
BATCHES = [tokens(2, 8), tokens(1, 6, seed=1)]


@pytest.fixture
def names() -> Iterator[None]:
    """Take the criteria that a test adds out again."""
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


def fixed(name: str, scores: Sequence[float], needs: Any = "profile") -> Criterion:
    by_window = dict(zip(WINDOWS, scores, strict=True))
    if needs == "profile":
        return Criterion(name, lambda profile, window: by_window[window], needs)
    return Criterion(name, lambda model, batches, windows, *, stack=None: [by_window[w] for w in windows], needs)


def test_every_criterion_is_named_after_itself_and_says_where_it_comes_from() -> None:
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert criterion.needs in ("profile", "model")
        assert (criterion.score.__doc__ or "").strip()
    with pytest.raises(
        StreamlineError, match=r"'cosinus'.*Expected one of cosine, angular, .*, taylor.*Did you mean 'cosine'"
    ):
        score_windows("cosinus", WINDOWS, profile=Profile(BLOCKS + 1))


def test_scores_are_in_the_order_of_the_windows() -> None:
    model = tiny_model("llama")
    for name in CRITERIA:
        batches = [tokens(4, 20)]
        forwards = score_windows(name, WINDOWS, model=model, batches=batches)
        assert score_windows(name, WINDOWS[::-1], model=model, batches=batches)[::-1] == pytest.approx(
            forwards, rel=1e-6
        )
        assert len(set(forwards)) == len(WINDOWS)
        assert score_windows(name, [], model=model, batches=batches) == []


def test_a_profile_in_hand_runs_nothing() -> None:
    model, called = tiny_model("llama"), []
    found = profile(model, BATCHES)
    model.register_forward_pre_hook(lambda m, a: called.append(m))
    for name, criterion in CRITERIA.items():
        if criterion.needs == "profile":
            score_windows(name, WINDOWS, profile=found, model=model, batches=BATCHES)
            score_windows(name, WINDOWS, profile=found)
    assert not called


def test_batches_that_can_be_read_but_once() -> None:
    """Each of a combination's passes sees them all."""
    both = combine_criteria({"perplexity": 1.0, "kl": 1.0, "cosine": 1.0}, by="weight")
    model = tiny_model("llama")
    once = score_windows(both, WINDOWS, model=model, batches=(b for b in BATCHES))  # type: ignore[arg-type]
    assert once == score_windows(both, WINDOWS, model=model, batches=BATCHES)


def test_a_users_criterion_of_a_profile_and_of_a_model(names: None) -> None:
    small = Criterion("small", lambda profile, window: -float(profile.norms[window.stop]), "profile", "mine")
    assert register_criterion(register_criterion(small)) is small  # as when a notebook's cell runs again
    model = tiny_model("llama")
    found = profile(model, BATCHES)
    assert score_windows("small", WINDOWS, profile=found) == [-float(found.norms[w.stop]) for w in WINDOWS]
    seen: list[Any] = []

    def heavy(model: Any, batches: Any, windows: Sequence[range], *, stack: str | None = None) -> torch.Tensor:
        seen.append((model, batches, stack))
        return torch.tensor([float(w.start) for w in windows])

    register_criterion(Criterion("heavy", heavy, "model"))
    got = score_windows("heavy", WINDOWS, model=model, batches=BATCHES, stack="model.layers")
    assert got == [0.0, 1.0, 2.0, 3.0] and all(type(score) is float for score in got)
    assert seen == [(model, BATCHES, "model.layers")]
    for taken in ("heavy", "cosine"):
        with pytest.raises(StreamlineError, match=rf"{taken!r}.*Choose"):
            register_criterion(Criterion(taken, lambda profile, window: 0.0, "profile"))
    for name in ("a b", "a+b", "a*b", "a:b"):
        with pytest.raises(StreamlineError, match=r"not a valid name of a criterion.*Choose another"):
            register_criterion(Criterion(name, heavy, "model"))
    with pytest.raises(StreamlineError, match=r"criterion=.*heavy.*Expected Criterion"):
        register_criterion(heavy)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"needs": "text"}, "needs='text'.*Expected one of profile, model"),
        ({"name": ""}, r"name=''.*Give"),
        ({"name": 3}, r"name=3.*Expected str"),
        ({"score": 3}, r"score=3.*Expected Callable"),
        ({"runs_per_window": 1}, r"runs_per_window=1.*Expected bool"),
    ],
)
def test_criteria_that_are_refused(changes: dict[str, Any], named: str) -> None:
    values: dict[str, Any] = {"name": "other", "score": lambda profile, window: 0.0, "needs": "profile", **changes}
    with pytest.raises(StreamlineError, match=named):
        Criterion(**values)


def test_combinations_of_one_name_are_told_apart(names: None) -> None:
    both = replace(combine_criteria({"cosine": 1.0, "last_n": 1.0}), name="both")
    assert register_criterion(register_criterion(both)) is both
    with pytest.raises(StreamlineError, match=r"'both'.*Choose"):
        register_criterion(replace(combine_criteria({"cosine": 1.0, "last_n": 2.0}), name="both"))


def test_what_a_config_names_as_its_criterion() -> None:
    assert (
        resolve_criterion(None, "kl") is resolve_criterion("kl") is resolve_criterion(CRITERIA["kl"]) is CRITERIA["kl"]
    )
    both = resolve_criterion({"cosine": 2.0, "kl": 1.0})
    assert both == combine_criteria({"cosine": 2.0, "kl": 1.0}) and both.runs_per_window and both.needs == "model"
    assert not combine_criteria({"cosine": 2.0, "taylor": 1.0}).runs_per_window
    for wrong, named in (({"cosin": 1.0}, "'cosin'.*Did you mean 'cosine'"), ({"cosine": 0.0}, "weight of 0.0")):
        with pytest.raises(StreamlineError, match=named):
            resolve_criterion(wrong)


SCORES = st.lists(st.floats(-9, 9), min_size=4, max_size=4)


@given(SCORES, SCORES, st.floats(0.1, 3), st.floats(0.1, 3))
def test_combinations_equal_numpy(first: list[float], second: list[float], a: float, b: float) -> None:
    """By rank: how many others a window beats, a tie counting half. By weight: the plain sum."""
    parts = {fixed("first", first): a, fixed("second", second): b}

    def ranks(scores: list[float]) -> np.ndarray:
        s = np.array(scores)
        return ((s[:, None] > s).sum(1) + ((s[:, None] == s).sum(1) - 1) / 2) / (len(s) - 1)

    some = Profile(BLOCKS + 1)
    by_rank = score_windows(combine_criteria(parts), WINDOWS, profile=some)
    assert by_rank == pytest.approx(list(a * ranks(first) + b * ranks(second)), abs=1e-12)
    by_weight = score_windows(combine_criteria(parts, by="weight"), WINDOWS, profile=some)
    assert by_weight == pytest.approx(list(a * np.array(first) + b * np.array(second)), abs=1e-12)


def test_a_combination_needs_what_its_parts_need() -> None:
    cheap, dear = fixed("cheap", [1, 2, 3, 4]), fixed("dear", [4.0, -math.inf, 2, 3], "model")
    both = combine_criteria({cheap: 2.0, dear: 1.0})
    assert (both.name, both.needs) == ("2 cheap + dear by rank", "model")
    assert combine_criteria({cheap: 1.0}).needs == "profile"
    model = tiny_model("llama")
    expected = pytest.approx([1, -math.inf, 5 / 3, 8 / 3])
    assert score_windows(both, WINDOWS, model=model, batches=BATCHES) == expected
    by_weight = score_windows(
        combine_criteria({both: 1.0, dear: 0.1}, by="weight"), WINDOWS, model=model, batches=BATCHES
    )
    assert by_weight[1] == -math.inf and all(map(math.isfinite, by_weight[2:]))
    assert combine_criteria({"cosine": 1.0, "taylor": 0.5}).paper == (
        "LLM-Streamline, arXiv 2403.19135; Shortened LLaMA, arXiv 2402.02834"
    )
    with pytest.raises(StreamlineError, match=r"'2.*rank'"):
        score_windows(both, WINDOWS, profile=Profile(BLOCKS + 1))
    with pytest.raises(StreamlineError, match=r"combination.*score_windows"):
        both.score(Profile(BLOCKS + 1), range(0, 1))
    assert score_windows(combine_criteria({cheap: 1.0}), WINDOWS[:1], profile=Profile(BLOCKS + 1)) == [0.0]


@pytest.mark.parametrize("by", ["rank", "weight"])
def test_what_must_not_go_by_one_of_the_parts_does_not_go_by_their_combination(by: Any) -> None:
    """However much the others speak for it, and in a combination of combinations too; the others' ranks stay."""
    liked, refused = fixed("liked", [9.0, 3, 2, 1]), fixed("refused", [-math.inf, 2, 1, 0])
    both = combine_criteria({liked: 9.0, refused: 0.1}, by=by)
    for one in (both, combine_criteria({both: 1.0, liked: 5.0}, by=by)):
        scores = score_windows(one, WINDOWS, profile=Profile(BLOCKS + 1))
        assert scores[0] == -math.inf and scores[1] > scores[2] > scores[3] > -math.inf
        best = best_windows(lambda w, one=one: score_windows(one, w, profile=Profile(BLOCKS + 1)), WINDOWS)
        assert [s.windows[0] for s in best] == WINDOWS[1:]


@pytest.mark.parametrize(
    ("parts", "by", "text"),
    [
        ({}, "rank", r"no criteria.*weights above 0"),
        ({"cosine": -1.0}, "rank", r"weight of -1.0"),
        ({"cosine": math.nan}, "weight", "weight of nan"),
        ({"cosine": 1.0}, "vote", r"by='vote' is unknown.*one of rank, weight"),
        ({"cosinus": 1.0}, "rank", "'cosinus'"),
    ],
)
def test_combinations_that_mean_nothing(parts: Any, by: Any, text: str) -> None:
    with pytest.raises(StreamlineError, match=text):
        combine_criteria(parts, by)


def test_what_is_missing_is_said() -> None:
    model = tiny_model("llama")
    for name in ("kl", "taylor", "repaired_residual", "perplexity"):
        with pytest.raises(StreamlineError, match=rf"'{name}'.*Pass model"):
            score_windows(name, WINDOWS, profile=profile(model, BATCHES))
    with pytest.raises(StreamlineError, match=r"'cosine' needs a profile.*Pass"):
        score_windows("cosine", WINDOWS)
    with pytest.raises(StreamlineError, match=r"'cosine' needs a profile.*Pass"):
        score_windows("cosine", WINDOWS, model=model)
    with pytest.raises(StreamlineError, match=r"another model.*profile of this model"):
        score_windows("cosine", WINDOWS, profile=profile(tiny_model("qwen3"), BATCHES), model=model)


@pytest.mark.parametrize("window", [range(4, 7), range(2, 2), range(-1, 2), range(0, 4, 2)])
def test_what_is_no_window(window: range) -> None:
    model = tiny_model("llama")
    for source in ({"model": model, "batches": BATCHES}, {"profile": profile(model, BATCHES)}):
        with pytest.raises(StreamlineError, match=r"not a window of this stack.*consecutive"):
            score_windows("cosine", [range(0, 1), window], **source)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_never_ranked(score: float) -> None:
    criterion = fixed("odd", [0.0, 1.0, score, 2.0])
    for one in (criterion, combine_criteria({criterion: 1.0})):
        with pytest.raises(StreamlineError, match=rf"'odd'.*{score} for blocks 2.*3.*Expected"):
            score_windows(one, WINDOWS, profile=Profile(BLOCKS + 1))


def test_as_many_scores_as_windows() -> None:
    odd = Criterion("odd", lambda model, batches, windows, *, stack=None: [1.0], "model")
    with pytest.raises(StreamlineError, match=r"'odd'.*1 scores.*4 windows.*Expected"):
        score_windows(odd, WINDOWS, model=tiny_model("llama"), batches=[])
