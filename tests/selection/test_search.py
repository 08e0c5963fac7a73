"""Ranking by a criterion; planted redundancy is found."""

from __future__ import annotations

import torch

from streamline_hooks import measure_similarity
from streamline_hooks.selection import ranked, windows
from streamline_hooks.selection.criteria import closeness, cosine
from tests.tiny_models import BLOCKS, tiny_model, tokens


def test_a_run_of_blocks_that_does_nothing_is_found() -> None:
    model = tiny_model("llama")
    for block in model.model.layers[2:4]:
        block.self_attn.o_proj.weight.data.mul_(1e-3)
        block.mlp.down_proj.weight.data.mul_(1e-3)
    similarity = measure_similarity(model, [tokens(4, 12)])
    for criterion in (cosine, closeness):
        best = ranked(similarity, windows(BLOCKS, 2), criterion)[0]
        assert best.window == range(2, 4) and best.score > 0.99


def test_ties_go_to_the_earlier_window() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    similarity = measure_similarity(model, [tokens(1, 4)])
    assert [s.window.start for s in ranked(similarity, windows(BLOCKS, 3))] == [0, 1, 2, 3]
    assert torch.allclose(similarity.cosine, torch.ones(7, 7, dtype=torch.float64))
