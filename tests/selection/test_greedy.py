"""Greedy search, against the loop written out on models that are cut for good."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack, profile, search
from streamline_hooks.evaluation import agreement
from streamline_hooks.selection import (
    AttentionSearch,
    GreedySearch,
    MLPSearch,
    SearchConfig,
    WindowSearch,
    windows_of_size,
)
from streamline_hooks.selection.criteria import Criterion, combine_criteria
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.selection.search_algorithms import greedy
from streamline_hooks.selection.selection import Selection, best_windows
from streamline_hooks.statistics import Profile
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import BLOCKS, left_padded, repaired, tiny_model, tokens

BATCHES = [left_padded(2, 8), tokens(2, 6, seed=1)]
MASKS = [torch.ones(2, length, dtype=torch.bool) for length in (8, 6)]


def by_hand(model: nn.Module, criterion: str, count: int, keep: set[int]) -> tuple[set[int], float]:
    """Each round cuts a copy for good, and keeps the names that the blocks had."""
    original, model, names, gone, total = model, copy.deepcopy(model), list(range(BLOCKS)), set(), 0.0
    given: dict[str, Any] = {"model": model, "batches": BATCHES}
    while len(gone) < count:
        free = windows_of_size(len(names), 1, frozenset(k for k, name in enumerate(names) if name in keep))
        scores = kls(original, model, free) if criterion == "kl" else score_windows(criterion, free, **given)
        best = max(range(len(free)), key=lambda k: (scores[k], -k))
        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.remove(free[best])
            surgeon.commit()
        gone |= {names[k] for k in free[best]}
        names = [name for k, name in enumerate(names) if k not in free[best]]
        total += scores[best]
    return gone, total


def kls(original: nn.Module, model: nn.Module, free: Sequence[range]) -> list[float]:
    """Minus the KL of what a model says without each window from what the original says, a token."""
    found = []
    for window in free:
        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.remove(window)
            found.append(-agreement(model, original, BATCHES).kl)
    return found


@settings(max_examples=6)
@given(
    st.sampled_from(["llama", "gpt2", "qwen3"]),
    st.sampled_from(["cosine", "block_influence", "kl", "last_n"]),
    st.integers(1, 4),
    st.sets(st.integers(0, BLOCKS - 1), max_size=1),
)
def test_greedy_is_the_loop_written_out(family: str, criterion: str, count: int, keep: set[int]) -> None:
    model = tiny_model(family)
    before = fingerprint(model)
    (found,) = greedy(model, BATCHES, criterion, count, protect=keep)
    assert fingerprint(model) == before
    gone, total = by_hand(model, criterion, count, keep)
    assert found.blocks == gone and not found.blocks & keep
    assert found.score == pytest.approx(total, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "criterion", ["kl", combine_criteria({"kl": 1.0}, by="weight")], ids=["alone", "in a combination"]
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_divergence_is_that_from_the_original_in_every_round(family: str, criterion: Any) -> None:
    """Which takes no second set of weights."""
    model = repaired(family) if family == "llama" else tiny_model(family)
    model.train()
    before = fingerprint(model)
    asked: list[Any] = []

    def no_copy(tensor: Any, memo: Any) -> None:
        asked.append(tensor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.Parameter, "__deepcopy__", no_copy)
        (found,) = greedy(model, BATCHES, criterion, 3)
    assert not asked and fingerprint(model) == before and model.training
    gone: set[int] = set()
    total, left = 0.0, list(range(len(find_stack(model))))
    for _ in range(3):
        without = {}
        for block in set(left) - gone:
            with LayerSurgeon(changed := copy.deepcopy(model)) as surgeon:
                for run in Selection.of_blocks([*gone, block]).windows:
                    surgeon.remove(run)
                without[block] = -agreement(changed, model, BATCHES).kl
        best = max(without, key=lambda block: without[block])
        gone.add(best)
        total += without[best]
    assert found.blocks == gone and found.score == pytest.approx(total, rel=1e-4)


def test_the_original_is_no_more_run_than_it_is_asked_for() -> None:
    """Neither in the first round, where it is the model itself, nor by a criterion that compares with nothing."""
    model, runs = tiny_model("llama"), 0

    def counted(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs += len(module.model.layers) == BLOCKS  # type: ignore[union-attr, arg-type]

    model.register_forward_pre_hook(counted)
    for criterion, count, more in (("kl", 1, 0), ("perplexity", 3, 0), ("kl", 3, 2)):
        greedy(model, BATCHES, criterion, 1)
        once, runs = runs, 0
        greedy(model, BATCHES, criterion, count)
        assert runs - once == more * len(BATCHES), criterion
        runs = 0


def test_a_run_that_spans_a_gap_goes_as_one_window() -> None:
    """Block 2 goes first, then the run of blocks 1 and 3, which have become neighbors."""
    rounds: Iterator[range] = iter([range(2, 3), range(1, 2), range(1, 2)])

    def scripted(model: nn.Module, batches: Any, asked: Sequence[range], *, stack: str | None = None) -> list[float]:
        wanted = next(rounds)
        return [1.0 if window.start == wanted.start else 0.0 for window in asked]

    model = tiny_model("llama")
    (found,) = greedy(model, BATCHES, Criterion("scripted", scripted, "model"), 3)
    assert found == Selection((range(1, 4),), score=3.0)


def test_every_round_profiles_what_is_left() -> None:
    seen: list[int] = []

    def watched(profile: Profile, window: range) -> float:
        seen.append(profile.length)
        return float(profile.value("cosine", window))

    greedy(tiny_model("llama"), BATCHES, Criterion("watched", watched, "profile"), 3)
    assert list(dict.fromkeys(seen)) == [6, 5, 4] and len(seen) == 6 + 5 + 4


@pytest.mark.parametrize("counted", [{"tokens": "last"}, {"skip": 3}])
def test_every_round_counts_the_tokens_of_the_given_profile(counted: dict[str, Any]) -> None:
    model, seen = tiny_model("llama"), list[Profile]()

    def watched(profile: Profile, window: range) -> float:
        seen.extend([profile] * (profile not in seen))
        return float(profile.value("cosine", window))

    given_profile = profile(model, BATCHES, **counted)
    (found,) = greedy(model, BATCHES, Criterion("watched", watched, "profile"), 2, profile=given_profile)
    assert seen[0] is given_profile and len(seen) == 2
    gone = min(found.blocks), max(found.blocks)
    for first in gone:  # one of the two went first
        with LayerSurgeon(changed := copy.deepcopy(model)) as surgeon:
            surgeon.remove(range(first, first + 1))
            surgeon.commit()
        again = profile(changed, BATCHES, replicates=0, **counted)
        if torch.allclose(again.cosine, seen[1].cosine):
            break
    else:
        pytest.fail("the second round measured other tokens")
    assert seen[1].tokens == given_profile.tokens < profile(model, BATCHES).tokens


def test_a_search_finds_one_block_like_a_window_search_with_the_same_profile() -> None:
    model = tiny_model("llama")
    for counted in ({}, {"tokens": "last"}, {"tokens": MASKS}):
        measured = profile(model, BATCHES, **counted)  # type: ignore[arg-type]
        window, block = (
            search(measured, 1, config, model=model, batches=BATCHES)[0]
            for config in (WindowSearch(criterion="cosine"), GreedySearch())
        )
        assert block == window


def test_tokens_that_later_rounds_cannot_count_are_refused() -> None:
    model = tiny_model("llama")
    masked = profile(model, BATCHES, tokens=MASKS)
    with pytest.raises(StreamlineError, match=r"masks, which it does not contain.*tokens='all' or 'last'"):
        search(masked, 2, GreedySearch(), model=model, batches=BATCHES)
    assert search(masked, 2, GreedySearch(criterion="kl"), model=model, batches=BATCHES)  # needs no profile


@pytest.mark.parametrize("config", [AttentionSearch(), MLPSearch()])
def test_a_search_of_branches_refuses_a_profile_of_some_tokens(config: SearchConfig) -> None:
    model = tiny_model("llama")
    assert search(profile(model, BATCHES), 2, config, model=model, batches=BATCHES)
    for counted, named in (({"tokens": "last"}, "tokens='last' and skip=0"), ({"skip": 2}, "tokens='all' and skip=2")):
        with pytest.raises(StreamlineError, match=f"{named}.*counts all real tokens.*Profile again"):
            search(profile(model, BATCHES, **counted), 2, config, model=model, batches=BATCHES)


def test_a_model_repaired_before_keeps_its_repair() -> None:
    model = repaired("llama")
    before, length = fingerprint(model), len(find_stack(model))
    (found,) = greedy(model, BATCHES, "cosine", 2)
    assert len(found.blocks) == 2 and fingerprint(model) == before and len(find_stack(model)) == length


def test_what_stood_between_two_blocks_is_gone_in_the_round_after_them() -> None:
    """As it is in the end, where they are one window."""
    model: Any = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(3, nn.Linear(model.config.hidden_size, model.config.hidden_size))
        surgeon.commit()
    with LayerSurgeon(model) as surgeon, torch.no_grad():
        surgeon.remove(range(2, 4))
        wanted = model(BATCHES[1]).logits
    wanted_first = iter([2, 2, 0])  # block 2, then 3 in its place, then any

    def scripted(model: Any, batches: Any, asked: Sequence[range], *, stack: str | None = None) -> list[float]:
        number = next(wanted_first)
        if number == 0:
            with torch.no_grad():
                assert torch.equal(model(BATCHES[1]).logits, wanted)
        return [1.0 if window.start == number else 0.0 for window in asked]

    (found,) = greedy(model, BATCHES, Criterion("scripted", scripted, "model"), 3)
    assert found.blocks == {0, 2, 3} and next(wanted_first, None) is None


def test_planted_blocks_are_found_although_they_are_apart() -> None:
    model = tiny_model("llama")
    for k in (1, 4):
        model.model.layers[k].self_attn.o_proj.weight.data.mul_(1e-3)
        model.model.layers[k].mlp.down_proj.weight.data.mul_(1e-3)
    for criterion in ("cosine", "kl"):
        assert greedy(model, BATCHES, criterion, 2)[0].blocks == {1, 4}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_later_round_leaves_nothing_behind(error: type[BaseException]) -> None:
    def failing(model: nn.Module, batches: Any, asked: Sequence[range], *, stack: str | None = None) -> list[float]:
        if len(asked) < BLOCKS - 1:
            raise error("stop")
        return [0.0] * len(asked)

    model = tiny_model("llama")
    before = fingerprint(model)
    with pytest.raises(error, match="stop"):
        greedy(model, BATCHES, Criterion("failing", failing, "model"), 4)
    assert fingerprint(model) == before


def test_blocks_that_cannot_go_are_named() -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp = model.model.layers[1].mlp
    before = fingerprint(model)
    wanting = Criterion("third", lambda profile, window: float(window.start == 3), "profile")
    with pytest.raises(UnsupportedSurgery, match=r"block 3.*3.*protect="):
        greedy(model, BATCHES, wanting, 2)
    assert fingerprint(model) == before
    assert greedy(model, BATCHES, wanting, 2, protect=[1, 3])[0].blocks == {0, 4}  # which is third then


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": 6}, "one block must stay"),
        ({"count": 2, "protect": range(BLOCKS)}, r"1 consecutive blocks.*6"),
        ({"count": 1, "criterion": "taste"}, r"'taste'.*unknown"),
    ],
)
def test_what_cannot_be_searched(options: dict[str, Any], text: str) -> None:
    with pytest.raises(StreamlineError, match=text):
        greedy(tiny_model("llama"), BATCHES, **{"criterion": "cosine", **options})


def test_best_windows_takes_any_criterion_and_a_profile_runs_nothing() -> None:
    from functools import partial

    from streamline_hooks.selection.search_algorithms import disjoint_windows, one_shot
    from streamline_hooks.statistics import profile

    model = tiny_model("llama")
    profiled = profile(model, BATCHES)
    handle = model.register_forward_pre_hook(lambda *given: pytest.fail("a forward"))
    score = partial(score_windows, "cosine", profile=profiled)
    best = best_windows(score, windows_of_size(BLOCKS, 2))[0]
    assert best.windows[0] == max(
        windows_of_size(BLOCKS, 2), key=lambda w: (profiled.cosine[w.start, w.stop], -w.start)
    )
    assert len(disjoint_windows(score, BLOCKS, 3, 2)[0].windows) == 2
    assert len(one_shot(score, BLOCKS, 3)[0].blocks) == 3
    handle.remove()
    assert torch.is_grad_enabled()
