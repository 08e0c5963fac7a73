"""Selections judged on whole models: as the surgeon would leave them, and nothing of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.core import prepare_inputs
from streamline_hooks.modeling import BRANCHES
from streamline_hooks.repair import insert_replacement, replace_branches
from streamline_hooks.selection import Selection
from streamline_hooks.selection.trial import Trial, branch_writers, trial_distances
from streamline_hooks.surgery import ModelSource
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, tiny_model, tokens


def kl_by_hand(model: nn.Module, batches: list[Any], attempt: Trial) -> float:
    """With a surgeon that probes, zeroes as it does for good, and in float64."""

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            logits = [model(**prepare_inputs(model, b)).logits[b["attention_mask"].bool()] for b in batches]
        return torch.cat(logits).double().log_softmax(-1)

    p = log_probabilities()
    replacement_modules = attempt.replacement_modules or (None,) * len(attempt.selection.windows)
    with LayerSurgeon(model) as surgeon:
        replace_branches(surgeon, attempt.maps)
        for window, replacement_module in zip(attempt.selection.windows, replacement_modules, strict=True):
            insert_replacement(surgeon, window, replacement_module)
        for k, branch in attempt.selection.zeroed:
            surgeon.zero_branch(k, branch)
        q = log_probabilities()
    return float((p.exp() * (p - q)).sum(-1).mean())


@st.composite
def attempts(draw: st.DrawFn) -> Trial:
    blocks = draw(st.sets(st.integers(0, BLOCKS - 1), max_size=BLOCKS - 1))
    rest = [(k, b) for k in range(BLOCKS) if k not in blocks for b in BRANCHES]
    zeroed = draw(st.sets(st.sampled_from(rest), min_size=0 if blocks else 1, max_size=3))
    selection = Selection.of_blocks(blocks, zeroed)
    modules = tuple(Nudge(seed=k) if draw(st.booleans()) else None for k in range(len(selection.windows)))
    return Trial(selection, draw(st.sampled_from([(), modules])))


@settings(max_examples=8)
@given(st.sampled_from(FAMILIES), st.lists(attempts(), min_size=1, max_size=2))
def test_a_selection_is_judged_as_the_surgeon_would_leave_it(family: str, drawn: list[Trial]) -> None:
    model = tiny_model(family)
    before = fingerprint(model)
    batches = [left_padded(3, 9), left_padded(2, 7, seed=1), left_padded(2, 8, seed=2)]
    writers: Any = branch_writers(find_stack(model), range(BLOCKS))
    assert not any(isinstance(paths, UnsupportedSurgery) for paths in writers.values())
    got = trial_distances(ModelSource(model), batches, drawn, "judge", writers=writers)
    assert fingerprint(model) == before
    for attempt, kl in zip(drawn, got, strict=True):
        assert kl == pytest.approx(kl_by_hand(model, batches, attempt), rel=2e-4, abs=1e-6)


def test_what_cannot_go_is_named_and_the_others_are_judged() -> None:
    model = tiny_model("llama")
    model.model.layers[4].mlp = model.model.layers[2].mlp
    before = fingerprint(model)
    tied, other = (Trial(Selection((window,))) for window in (range(2, 3), range(1, 2)))
    refused, kl = trial_distances(ModelSource(model), [tokens(2, 6), tokens(2, 5)], [tied, other], "judge")
    assert isinstance(refused, UnsupportedSurgery) and "blocks 2, 4 share parameters" in str(refused)
    assert isinstance(kl, float) and kl > 0
    assert fingerprint(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("forward", range(4))
def test_an_error_inside_leaves_nothing_behind(error: type[BaseException], forward: int) -> None:
    model = tiny_model("llama").train()
    stack, count = find_stack(model), []

    def fail(*given: Any) -> None:
        count.append(1)
        if len(count) == forward + 1:
            raise error("stop")

    writers: Any = branch_writers(stack, range(BLOCKS))
    handle = model.model.layers[5].mlp.register_forward_hook(fail)
    before = fingerprint(model)
    drawn = [Trial(Selection((range(1, 3),), ((4, "mlp"), (5, "attention"))), (Nudge(),))]
    with pytest.raises(error, match="stop"):
        trial_distances(ModelSource(model), [tokens(1, 4), tokens(1, 5)], drawn, "judge", writers=writers)
    assert fingerprint(model) == before
    handle.remove()


def test_an_original_without_finite_logits_judges_nothing() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(StreamlineError, match=r"original's logits.*NaN.*batch 0"):
        trial_distances(ModelSource(model), [tokens(1, 4)], [Trial(Selection((range(1, 3),)))], "judge")
    empty = {"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    for batches in ([], [empty]):
        with pytest.raises(StreamlineError, match="contain no real token"):
            trial_distances(ModelSource(tiny_model("llama")), batches, [], "judge")
