"""Ranking windows by a criterion or any score; planted redundancy is found."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from streamline_hooks import StreamlineError
from streamline_hooks.selection import windows_of_size
from streamline_hooks.selection.criteria import Criterion, angular_similarity, cosine
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.selection.selection import best_windows
from streamline_hooks.statistics import profile
from tests.tiny_models import BLOCKS, tiny_model, tokens


def test_a_run_of_blocks_that_does_nothing_is_found() -> None:
    model = tiny_model("llama")
    for block in model.model.layers[2:4]:
        block.self_attn.o_proj.weight.data.mul_(1e-3)
        block.mlp.down_proj.weight.data.mul_(1e-3)
    profiled = profile(model, [tokens(4, 12)])
    for criterion in (cosine, angular_similarity):
        best = best_windows(lambda ws, c=criterion: [c(profiled, w) for w in ws], windows_of_size(BLOCKS, 2))[0]
        assert best.windows == (range(2, 4),) and best.score > 0.99


def test_ties_go_to_the_earlier_window() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    profiled = profile(model, [tokens(1, 4)])
    found = best_windows(lambda ws: [cosine(profiled, w) for w in ws], windows_of_size(BLOCKS, 3))
    assert [s.windows[0].start for s in found] == [0, 1, 2, 3]
    assert torch.allclose(profiled.cosine, torch.ones(7, 7, dtype=torch.float64))


def test_windows_of_different_lengths_are_ranked_too() -> None:
    found = best_windows(lambda ws: [float(len(w)) for w in ws], [range(1, 2), range(0, 3), range(2, 4)])
    assert [s.windows[0] for s in found] == [range(0, 3), range(2, 4), range(1, 2)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_cannot_be_ranked_is_refused(bad: float) -> None:
    profiled = profile(tiny_model("llama"), [tokens(1, 4)])
    criterion = Criterion("bad", lambda p, w: bad if w.start == 1 else 0.0, "profile")
    with pytest.raises(StreamlineError, match=rf"returned {bad} for blocks 1 to 2"):
        score_windows(criterion, windows_of_size(4, 2), profile=profiled)
    with pytest.raises(StreamlineError, match="None of the 0 candidate windows"):
        best_windows(lambda ws: [], [])
    found = best_windows(lambda ws: [-math.inf, 0.0], [range(0, 1), range(1, 2)])
    assert [s.windows for s in found] == [(range(1, 2),)]
    with pytest.raises(StreamlineError, match="None of the 1 candidate windows"):
        best_windows(lambda ws: [-math.inf], [range(0, 1)])


def test_a_window_that_a_profile_does_not_cover_is_not_ranked() -> None:
    profiled = profile(tiny_model("llama"), [tokens(1, 4)], protect=[4, 5])
    score = partial(lambda p, ws: [cosine(p, w) for w in ws], profiled)
    assert len(best_windows(score, windows_of_size(BLOCKS, 2, frozenset({4, 5})))) == 3
    with pytest.raises(StreamlineError):
        best_windows(score, windows_of_size(BLOCKS, 2))
