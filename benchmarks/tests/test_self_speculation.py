"""Drafts of a smaller depth never change the text."""

from __future__ import annotations

import pytest
import torch

from benchmarks.self_speculation import greedy, measure, speculate, table
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import DepthCut, set_depths
from tests.tiny_models import WIDTH, tiny_model, tokens


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("drafts", [1, 3, 20])
def test_the_text_is_that_of_greedy_decoding(family: str, drafts: int) -> None:
    model, cut = tiny_model(family), DepthCut((range(2, 4),), (None,))
    with torch.no_grad():
        for seed in range(3):
            ids = tokens(1, 5 + seed, seed)
            found, right, drafted = speculate(model, cut, ids, 9, drafts)
            assert torch.equal(found, greedy(model, ids, 9)) and 0 <= right <= drafted
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_a_draft_of_all_blocks_is_always_accepted() -> None:
    model = tiny_model("llama")
    for parameter in model.model.layers[3].parameters():  # a block that does nothing
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        _, right, drafted = speculate(model, DepthCut((range(3, 4),), (None,)), tokens(1, 6), 9, 2)
    assert right == drafted > 0


def test_each_depth_and_number_of_drafts_has_a_row() -> None:
    model = tiny_model("llama")
    set_depths(model, [DepthCut((range(2, 3),), (None,)), DepthCut((range(2, 4),), (LinearReplacement(WIDTH),))])
    rows = measure(model, [tokens(1, 7)], [1, 2], 5)
    assert [(row["depth"], row["drafts"]) for row in rows] == [(5, 1), (5, 2), (4, 1), (4, 2)]
    assert "| 4 | 2 |" in table(rows, "command")
